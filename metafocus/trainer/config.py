"""FocuSFT's settings as command lines and configuration files write them: words and numbers.

In Python, objects are passed to `FocusTrainer(recipe={...})`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import TrainingArguments

from metafocus import masks
from metafocus.adapters import LoRA, NoAdapter, top_layers
from metafocus.errors import ProblemError
from metafocus.masks import MaskPolicy
from metafocus.solvers import SGD, clip_per_tensor
from metafocus.trainer import words
from metafocus.trainer.peft import BelowPeft, is_peft

NO_DEEPSPEED = (
    "deepspeed={!r} is not supported by FocusTrainer: its engine must run the forward pass itself; "
    "use DDP, or fsdp with version 2."
)


def described(default: Any, text: str) -> Any:
    """Return a dataclass field with a default and a text for `--help`."""
    return field(default=default, metadata={"help": text})


@dataclass
class FocusOptions:
    """How FocuSFT adapts; the defaults are the paper's.

    `FocusArguments` is this and `TrainingArguments` in one. Where a trainer has a class of
    arguments of its own, as in TRL, it is passed beside it: `focus=FocusOptions(...)`.

    Raises:
        ProblemError: for a word that stands for nothing.

    Example:
        >>> FocusOptions(inner_steps=4).solver()
        SGD(lr=1.0, steps=4, momentum=0.0, nesterov=False, weight_decay=0.0, \
clip=clip_per_tensor(limit=1.0))
    """

    method: str = described("focusft", "focusft, or sft: the same run without fast weights")
    inner_steps: int = described(2, "inner steps")
    inner_lr: float = described(1.0, "inner learning rate")
    inner_clip: float = described(1.0, "largest gradient norm of each fast weight")
    lora_rank: int = described(32, "rank of the fast weights")
    lora_alpha: float = described(64.0, "alpha of the fast weights")
    layer_fraction: float = described(0.35, "share of the layers, from the top, with fast weights")
    target_modules: str = described("gate_proj,up_proj,down_proj", "modules with fast weights")
    mask: str | None = described(
        None,
        f"{', '.join(words.MASKS)}; default: context-bidirectional for focusft, causal for sft",
    )
    estimator: str = described("first-order", ", ".join(words.ESTIMATORS))
    inner_tokens: str = described(
        "answer", f"what the inner loss scores: {', '.join(words.TOKENS)}"
    )
    per_example: bool = described(False, "fast weights of its own for each sample of a batch")
    adaptation_seed: int = described(0, "of the fast weights' starts")
    adaptation_start: str = described(
        "micro-batch", "micro-batch: a start for each; step: one start for an optimiser step"
    )
    evaluate_on: str = described(
        "deployed", "deployed: without fast weights; prompt: adapted on each prompt, no labels"
    )
    eval_mask: str = described(
        "causal", "mask in evaluation; causal is what a saved model runs with"
    )
    max_skipped: int = described(10, "adaptations that may fail (NaN) before training stops")

    def __post_init__(self) -> None:
        for name, table in {
            "method": ("focusft", "sft"),
            "estimator": words.ESTIMATORS,
            "inner_tokens": words.TOKENS,
            "adaptation_start": ("micro-batch", "step"),
            "evaluate_on": ("deployed", "prompt"),
            "eval_mask": words.MASKS,
        }.items():
            _known(name, getattr(self, name), table)
        if self.mask is not None:
            _known("mask", self.mask, words.MASKS)
        if not 0 <= self.adaptation_seed < 2**63:
            raise ProblemError(
                f"adaptation_seed must be in [0, 2**63), got {self.adaptation_seed}."
            )
        if self.max_skipped < 0:
            raise ProblemError(f"max_skipped must be >= 0, got {self.max_skipped}.")
        # By the names that a file or a command line gave; build once, to fail early.
        for name, good in (
            ("inner_steps", self.inner_steps >= 0),
            ("inner_lr", 0 <= self.inner_lr < math.inf),
            ("inner_clip", 0 < self.inner_clip < math.inf),
        ):
            if not good:
                low = "> 0" if name == "inner_clip" else ">= 0"
                raise ProblemError(f"{name} must be finite and {low}, got {getattr(self, name)}.")
        self.solver()
        LoRA(top_layers(self.layer_fraction, self._names()), self.lora_rank, self.lora_alpha)
        after = getattr(super(), "__post_init__", None)
        if after is not None:
            after()

    def _names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.target_modules.split(",") if name.strip())

    def solver(self) -> SGD:
        """The inner optimiser."""
        return SGD(self.inner_lr, self.inner_steps, clip=clip_per_tensor(self.inner_clip))

    def adapter(self, model: nn.Module) -> LoRA:
        """The fast weights; below PEFT's adapters if the model has some, none for sft."""
        if self.method == "sft":
            return NoAdapter()
        where = top_layers(self.layer_fraction, self._names())
        placed = BelowPeft(where) if is_peft(model) else where
        return LoRA(placed, rank=self.lora_rank, alpha=self.lora_alpha)

    def evaluation_mask(self) -> MaskPolicy:
        """Which keys a query sees in evaluation."""
        return words.MASKS[self.eval_mask]

    def recipe(self, model: nn.Module) -> dict[str, Any]:
        """The keywords of `mf.recipes.focusft` that these settings stand for."""
        default = masks.causal if self.method == "sft" else masks.context_bidirectional
        found = {
            "adapter": self.adapter(model),
            "mask": default if self.mask is None else words.MASKS[self.mask],
            "solver": self.solver(),
            "estimator": words.ESTIMATORS[self.estimator](),
            "inner_tokens": words.TOKENS[self.inner_tokens],
        }
        return {**found, "per_example": True} if self.per_example else found


@dataclass
class FocusArguments(FocusOptions, TrainingArguments):
    """`transformers.TrainingArguments` with the settings of `FocusOptions`.

    One default differs from transformers': `remove_unused_columns` is False, because batches carry
    `answer_mask` and `turn_ids`, which no model's forward takes.

    Raises:
        ProblemError: for settings that a FocuSFT run would silently ignore.

    Example:
        >>> FocusArguments(output_dir="run", use_cpu=True, report_to="none").inner_steps
        2
    """

    remove_unused_columns: bool = described(False, "must stay False")

    def __post_init__(self) -> None:
        if self.deepspeed:
            # transformers would look for the package first.
            raise ProblemError(NO_DEEPSPEED.format(self.deepspeed))
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ProblemError(
                    f"{name} must be a finite number >= 0, got {getattr(self, name)}."
                )
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise ProblemError(f"{name} must be >= 1, got {getattr(self, name)}.")
        super().__post_init__()
        if self.remove_unused_columns:
            raise ProblemError(
                "remove_unused_columns=True would drop answer_mask and turn_ids from every sample: "
                "leave it False."
            )


def _known(name: str, word: Any, table: Any) -> None:
    if not isinstance(word, str) or word not in table:
        raise ProblemError(f"{name}={word!r} is unknown: use one of {', '.join(table)}.")
