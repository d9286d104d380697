"""Attention profiles during training with Hugging Face's Trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from metafocus import masks
from metafocus.checks import whole
from metafocus.diagnostics import AttentionProfile, Moment, attention_profile
from metafocus.errors import ProblemError
from metafocus.lm import Adapter, Batch
from metafocus.masks import MaskPolicy
from metafocus.trainer.batch import as_batch
from metafocus.types import Params

Adapt = Callable[[nn.Module, Batch], tuple[Adapter, Params]]
"""`(model, batch) -> (adapter, fast weights)`."""


class ProfileCallback(TrainerCallback):
    """Profiles one batch before training, every few steps, and after the last one.

    Each time costs one forward pass of the batch without gradients and about as much again for
    the measures. Nothing random is drawn, so the training is the same with and without it. With
    several processes each makes the same profile. A checkpoint keeps the history, and a run that is
    resumed from it goes on with it.

    Args:
        batch: As `attention_profile` takes it, or as a collator makes it (with `labels`).
        every: Optimiser steps from one profile to the next.
        mask: Which keys each query sees.
        adapt: Makes fast weights for each profile; None: the model is profiled as it is deployed.
        name: Of the file in a checkpoint, `<name>.json`: another for a second callback.

    Attributes:
        history: A `Moment` for each profile, for `plot_engagement`.
        first: The first profile of this process, or None.
        last: The latest profile, or None.

    Raises:
        ProblemError: If `every` is not a whole number of at least 1.

    Example:
        >>> batch = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[-100, 4]])}
        >>> ProfileCallback(batch, every=10).history
        []
    """

    def __init__(
        self,
        batch: Mapping[str, Any],
        *,
        every: int,
        mask: MaskPolicy = masks.context_bidirectional,
        adapt: Adapt | None = None,
        name: str = "attention_profile",
    ):
        whole("every", every, 1, error=ProblemError)
        self._batch, self._every, self._mask, self._adapt = as_batch(batch), every, mask, adapt
        self._file = f"{name}.json"
        self.history: list[Moment] = []
        self.first: AttentionProfile | None = None
        self.last: AttentionProfile | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **others: Any
    ) -> None:
        """Profile the model before training, unless a resumed run has that profile."""
        file = self._place(args, state)
        if state.global_step and file.exists():
            rows: list[dict[str, Any]] = json.loads(file.read_text())
            self.history = []
            for row in rows:
                fields: dict[str, Any] = {
                    k: tuple(v) if isinstance(v, list) else v for k, v in row.items()
                }
                self.history.append(Moment(**fields))
        if not self.history or self.history[-1].step != state.global_step:
            self._record(state.global_step, model)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Keep the history in the checkpoint that was just written."""
        file = self._place(args, state)
        if state.is_world_process_zero and file.parent.is_dir():
            file.write_text(json.dumps([asdict(moment) for moment in self.history]) + "\n")

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **others: Any
    ) -> None:
        """Profile the model if it is time."""
        if state.global_step % self._every == 0:
            self._record(state.global_step, model)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **others: Any
    ) -> None:
        """Profile the trained model, unless its last step was."""
        if not self.history or self.history[-1].step != state.global_step:
            self._record(state.global_step, model)

    def _place(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", self._file)

    def _record(self, step: int, model: nn.Module) -> None:
        device = next(model.parameters()).device
        batch = {k: v.to(device) for k, v in self._batch.items()}
        adapter, fast = (None, None) if self._adapt is None else self._adapt(model, batch)
        profile = attention_profile(model, batch, mask=self._mask, adapter=adapter, fast=fast)
        self.history.append(Moment.of(step, profile))
        self.first, self.last = self.first or profile, profile
