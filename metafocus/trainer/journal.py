"""Sums over the inner loops of a logging window: kept on the device, read once per log entry."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metafocus.errors import NonFiniteError
from metafocus.trainer.inner import Stopwatch


class Journal:
    """Sums over micro-batches, for the log; and how many adaptations failed so far.

    Attributes:
        inner: the time of inner loops.
        whole: the time of forward and backward passes, inner loops included.
        skipped: adaptations left out since the process began, on all ranks.
    """

    def __init__(self, device: torch.device, max_skipped: int):
        self.inner: Stopwatch = Stopwatch(device)
        self.whole: Stopwatch = Stopwatch(device)
        self.skipped: int = 0
        self._max_skipped = max_skipped
        self._sums: dict[str, Tensor] = {}
        self._bad_losses = torch.zeros((), device=device)

    def add(self, values: dict[str, Tensor]) -> None:
        """Add scalars to the sums of their names; nothing is read."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def micro_batch(
        self, loss: Tensor, inner: Tensor, weight: Tensor, *, same_tokens: bool
    ) -> None:
        """Add a micro-batch.

        Args:
            loss: the outer loss.
            inner: the loss before each inner step, `[steps]`, or `[steps, B]`.
            weight: 1, or 0 for a batch without answers.
            same_tokens: both losses score the same tokens: then the outer one is the inner one
                after its last step.
        """
        loss = loss.detach()
        self._bad_losses = self._bad_losses + ~loss.isfinite()
        values = {
            "calls": torch.ones_like(weight),
            "with_answers": weight,
        }
        if len(inner):
            curve = inner.flatten(1).mean(1) if inner.ndim > 1 else inner
            values |= {f"inner_loss_{i}": weight * x for i, x in enumerate(curve)}
            values["adaptation_gain"] = weight * (curve[0] - (loss if same_tokens else curve[-1]))
            if same_tokens:
                values["last_step_rose"] = weight * (loss > curve[-1])
        self.add(values)

    def drain(self, reduce: Callable[[Tensor], Tensor], step: int) -> dict[str, float]:
        """Return the window's means over all ranks, and begin a new window; one host sync.

        Raises:
            NonFiniteError: after too many failed adaptations.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        found = dict(zip(names, sums, strict=True))
        self._sums = {}
        inner, whole = self.inner.drain(), self.whole.drain()
        calls, answered = found.pop("calls"), max(found.pop("with_answers"), 1.0)
        self.skipped += round(found.pop("skipped", 0.0))
        self._check(step)
        means = {
            name: value / (calls if name.startswith("fast_weight") else answered)
            for name, value in found.items()
        }
        steps = sum(name.startswith("inner_loss_") for name in means)
        if steps:
            means["inner_loss_first"] = means["inner_loss_0"]
            means["inner_loss_last"] = means[f"inner_loss_{steps - 1}"]
            means["inner_time_share"] = inner / max(whole, 1e-9)
            means["skipped_adaptations"] = float(self.skipped)
        return means

    def take_bad_losses(self) -> Tensor:
        """Return how many losses were not finite since the last call; nothing is read."""
        found, self._bad_losses = self._bad_losses, torch.zeros_like(self._bad_losses)
        return found

    def _check(self, step: int) -> None:
        if self.skipped > self._max_skipped:
            raise NonFiniteError(
                f"{self.skipped} adaptations were not finite and were left out by step {step}, "
                f"more than max_skipped={self._max_skipped}. Lower inner_lr or inner_clip, or look "
                "at the data; the checkpoints saved so far are whole."
            )
