"""FocuSFT's settings as command lines and configuration files write them: names and numbers.

In Python, objects are passed to `FocusTrainer(recipe={...})`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments

from metafocus.adapters import LoRA, NoAdapter, Placement, top_layers
from metafocus.errors import ProblemError
from metafocus.masks import MaskPolicy
from metafocus.solvers import SGD, clip_per_tensor
from metafocus.trainer.names import ESTIMATORS, MASKS, TOKENS, named
from metafocus.trainer.peft import BelowPeft, is_peft
from metafocus.trainer.refusals import check_json, check_numbers, refuse_parallel


def _read_switch(args: Any) -> None:
    # A file says `true` where a command line has the flag alone.
    if str(args.fsdp).lower() in ("true", "false"):
        args.fsdp = str(args.fsdp).lower() == "true" or None


def described(default: Any, text: str) -> Any:
    """Return a dataclass field with a default and a text for `--help`."""
    return field(default=default, metadata={"help": text})


@dataclass
class FocusOptions:
    """How FocuSFT adapts; the defaults are the paper's.

    `FocusArguments` is this and `TrainingArguments` in one. Where a trainer has a class of
    arguments of its own, as in TRL, this is passed beside it: `focus=FocusOptions(...)`.

    Raises:
        ProblemError: for an unknown name, or a number out of range.

    Example:
        >>> FocusOptions(inner_steps=4).solver()
        SGD(lr=1.0, steps=4, momentum=0.0, nesterov=False, weight_decay=0.0, \
clip=clip_per_tensor(limit=1.0))
    """

    _argument_group_name = "FocuSFT"

    method: str = described("focusft", "focusft, or sft: the same run without fast weights")
    mask: str | None = described(
        None,
        f"which keys a token sees: {', '.join(MASKS)}; default: context-bidirectional for "
        "focusft, causal for sft",
    )
    estimator: str = described("first-order", f"the hypergradient: {', '.join(ESTIMATORS)}")
    inner_steps: int = described(2, "steps of the inner loop")
    inner_lr: float = described(1.0, "learning rate of the inner loop")
    inner_clip: float = described(1.0, "largest gradient norm of each fast weight")
    inner_tokens: str = described("answer", f"what the inner loss scores: {', '.join(TOKENS)}")
    layer_fraction: float = described(0.35, "share of the layers, from the top, with fast weights")
    lora_rank: int = described(32, "rank of the fast weights")
    lora_alpha: float | None = described(
        None, "the fast weights are scaled by lora_alpha / lora_rank; default: twice lora_rank"
    )
    lora_modules: str = described(
        "gate_proj,up_proj,down_proj", "modules with fast weights, separated by commas"
    )
    per_example: bool = described(False, "each sample of a batch has fast weights of its own")
    sequence_parallel: int = described(
        1, "how many processes share each sequence; it must divide their number and the query heads"
    )
    inner_checkpointing: str = described(
        "auto",
        "with gradient_checkpointing, whether the inner loop checkpoints: true, false, or auto: "
        "only if its activations do not fit into half of the free memory",
    )
    adaptation_seed: int = described(0, "seed of the fast weights' starts")
    adaptation_start: str = described(
        "micro-batch", "micro-batch: a start for each; step: one start for an optimiser step"
    )
    evaluate_on: str = described(
        "deployed", "deployed: without fast weights; prompt: adapted to each prompt, no labels"
    )
    eval_mask: str = described(
        "causal", "mask in evaluation; causal is what a saved model runs with"
    )
    max_skipped: int = described(10, "adaptations that may fail (NaN) before training stops")
    on_nonfinite: str = described(
        "skip", "a step whose gradient is NaN or infinite: skip leaves it out, stop ends the run"
    )
    max_nonfinite: int = described(5, "steps in a row that may be left out before training stops")

    sharding: str | None = described(
        None,
        "parametrised: weights are sharded over the processes, and gathered in a way that every "
        "estimator can differentiate; default: DDP, or what --fsdp says",
    )
    allow_changed: bool = described(
        False, "resume although settings or data differ from those of the checkpoint"
    )

    def __post_init__(self) -> None:
        for name, table in {
            "method": dict.fromkeys(("focusft", "sft")),
            "estimator": ESTIMATORS,
            "inner_tokens": TOKENS,
            "adaptation_start": dict.fromkeys(("micro-batch", "step")),
            "evaluate_on": dict.fromkeys(("deployed", "prompt")),
            "eval_mask": MASKS,
            "inner_checkpointing": dict.fromkeys(("auto", "true", "false")),
            "on_nonfinite": dict.fromkeys(("skip", "stop")),
        }.items():
            named(name, getattr(self, name), table)
        if self.sharding not in (None, "parametrised"):
            raise ProblemError(f"sharding must be 'parametrised' or None, got {self.sharding!r}.")
        self.policy()
        if not 0 <= self.adaptation_seed < 2**63:
            raise ProblemError(
                f"adaptation_seed must be in [0, 2**63), got {self.adaptation_seed}."
            )
        for name in ("max_skipped", "max_nonfinite"):
            if getattr(self, name) < 0:
                raise ProblemError(f"{name} must be >= 0, got {getattr(self, name)}.")
        # Checked here as well, by the names that a file or a command line gave.
        for name, good, low in (
            ("inner_steps", self.inner_steps >= 0, ">= 0"),
            ("inner_lr", 0 <= self.inner_lr < math.inf, ">= 0"),
            ("inner_clip", 0 < self.inner_clip < math.inf, "> 0"),
            ("lora_rank", self.lora_rank >= 1, ">= 1"),
            ("sequence_parallel", self.sequence_parallel >= 1, ">= 1"),
            ("lora_alpha", self.lora_alpha is None or 0 < self.lora_alpha < math.inf, "> 0"),
        ):
            if not good:
                raise ProblemError(f"{name} must be finite and {low}, got {getattr(self, name)}.")
        self.placement()
        after = getattr(super(), "__post_init__", None)
        if after is not None:
            after()

    def mask_name(self) -> str:
        """The mask in training: the method's own, where none is given."""
        return self.mask or ("causal" if self.method == "sft" else "context-bidirectional")

    def policy(self) -> MaskPolicy:
        """Which keys a token sees in training."""
        return named("mask", self.mask_name(), MASKS)

    def solver(self) -> SGD:
        """The inner optimiser."""
        return SGD(self.inner_lr, self.inner_steps, clip=clip_per_tensor(self.inner_clip))

    def placement(self) -> Placement:
        """Where a plain model has fast weights."""
        names = tuple(name.strip() for name in self.lora_modules.split(",") if name.strip())
        return top_layers(self.layer_fraction, names)

    def adapter(self, model: nn.Module) -> LoRA | NoAdapter:
        """The fast weights; below PEFT's adapters if the model has some, none for sft."""
        if self.method == "sft":
            return NoAdapter()
        where = self.placement()
        return LoRA(BelowPeft(where) if is_peft(model) else where, self.lora_rank, self.lora_alpha)

    def evaluation_mask(self) -> MaskPolicy:
        """Which keys a token sees in evaluation."""
        return MASKS[self.eval_mask]

    def recipe(self, model: nn.Module) -> dict[str, Any]:
        """The keywords of `mf.recipes.focusft` that these settings stand for."""
        found: dict[str, Any] = {
            "adapter": self.adapter(model),
            "mask": self.policy(),
            "solver": self.solver(),
            "estimator": ESTIMATORS[self.estimator](),
            "inner_tokens": TOKENS[self.inner_tokens],
        }
        if self.inner_checkpointing != "auto":
            found["inner_checkpointing"] = self.inner_checkpointing == "true"
        return {**found, "per_example": True} if self.per_example else found


@dataclass
class FocusArguments(FocusOptions, TrainingArguments):
    """`transformers.TrainingArguments` with the settings of `FocusOptions`.

    Two defaults differ from transformers': `remove_unused_columns` is False, because batches carry
    `answer_mask` and `turn_ids`, which no model's forward takes; and `logging_steps` is 10, so that
    a short run has a history too.

    Raises:
        ProblemError: for settings that a FocuSFT run would silently ignore.

    Example:
        >>> FocusArguments(output_dir="run", use_cpu=True, report_to="none").inner_steps
        2
    """

    remove_unused_columns: bool = described(False, "must stay False")
    logging_steps: float = described(10, "optimiser steps from one log entry to the next")

    def __post_init__(self) -> None:
        # Before transformers, which would look for the packages first.
        refuse_parallel(self, os.environ)
        _read_switch(self)
        check_json(self)
        check_numbers(self)
        if self.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # transformers passes ddp_timeout on for accelerators only.
            wait = timedelta(seconds=self.ddp_timeout)
            PartialState(cpu=True, backend=self.ddp_backend, timeout=wait)
        super().__post_init__()
        if self.device.type == "cpu":
            # torch warns that it does nothing there.
            self.dataloader_pin_memory = False
        if self.remove_unused_columns:
            raise ProblemError(
                "remove_unused_columns=True would drop answer_mask and turn_ids from every sample: "
                "leave it False."
            )
