"""Time and loss of a whole run, over all the processes that it took."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Totals:
    """Sums that continue from the values in a checkpoint.

    Args:
        device: where losses are summed; nothing is read before a checkpoint.
        before: what `now` returned when the checkpoint was saved.
    """

    def __init__(self, device: torch.device, before: dict[str, float] | None = None):
        self._before = before or {}
        self._start = time.monotonic()
        self.loss: Tensor = torch.zeros((), device=device)

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch, weighted as in its step."""
        loss = loss.detach().float()
        self.loss = self.loss + torch.where(loss.isfinite(), loss, 0.0)

    def now(self, loss: float) -> dict[str, float]:
        """Return the sums; `loss` is `self.loss` as a mean over ranks."""
        seconds = time.monotonic() - self._start
        return {
            "seconds": self._before.get("seconds", 0.0) + seconds,
            "loss": self._before.get("loss", 0.0) + loss,
        }


def metrics_of(sums: dict[str, float], steps: int, batch: int) -> dict[str, Any]:
    """Return the Trainer's metrics for a whole run.

    Example:
        >>> metrics_of({"seconds": 4.0, "loss": 6.0}, steps=2, batch=8)["train_samples_per_second"]
        4.0
    """
    seconds, count = sums["seconds"], max(steps, 1)
    return {
        "train_runtime": round(seconds, 4),
        "train_samples_per_second": round(steps * batch / max(seconds, 1e-9), 3),
        "train_steps_per_second": round(steps / max(seconds, 1e-9), 3),
        "train_loss": sums["loss"] / count,
    }
