"""Steps whose gradient is not finite: left out and counted, or the end of the run."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from metafocus.errors import NonFiniteError


@dataclass
class StepGuard:
    """Decides what is done about a step whose loss or gradient is not finite.

    Args:
        policy: "skip" leaves the step out, "stop" ends the run.
        limit: how many steps in a row may be left out before the run ends.

    Attributes:
        skipped: steps left out so far.
        scaler_skips: steps that the gradient scaler of fp16 left out to lower its scale. They are
            counted apart, because they are how it finds its scale.
    """

    policy: str
    limit: int
    skipped: int = 0
    scaler_skips: int = 0
    _in_a_row: int = 0
    _bad_losses: int = 0

    def good(self) -> None:
        """Note a step that is finite."""
        self._in_a_row = 0

    def bad(self, norm: float, bad_losses: int, step: int, scale: float | None = None) -> None:
        """Note a step that is not finite.

        Args:
            norm: of the gradient, over all ranks.
            bad_losses: how many losses of the step were not finite, on all ranks.
            step: how many steps were taken before it.
            scale: of the gradient scaler. While it is above 1 it may be the cause.

        Raises:
            NonFiniteError: by the policy, or after too many in a row.
        """
        if scale is not None and scale > 1 and not math.isfinite(norm) and not bad_losses:
            self.scaler_skips += 1
            return
        self.skipped += 1
        self._in_a_row += 1
        self._bad_losses += bad_losses
        if self.policy == "skip" and self._in_a_row <= self.limit:
            return
        row = f"{self._in_a_row} steps in a row, more than max_nonfinite={self.limit}; the last: "
        what = (
            f"the training loss was NaN or infinite {bad_losses} times"
            if bad_losses
            else f"the gradient norm is {norm}"
        )
        raise NonFiniteError(
            f"{row * (self.policy == 'skip')}{what} at step {step}. The model keeps the weights "
            "from before this step, and the checkpoints saved so far are whole. Lower "
            "learning_rate, or look at the data."
        )

    def check_end(self, steps: int) -> None:
        """Raise at the end of a run in which no step was finite."""
        if steps and self.skipped + self.scaler_skips >= steps:
            what = "loss" if self._bad_losses else "gradient"
            times = self._bad_losses or steps
            raise NonFiniteError(
                f"the training {what} was NaN or infinite {times} times by step {steps}: no step "
                "was taken, and the model is as it was. Lower learning_rate, or look at the data."
            )


class HeldSchedule:
    """The learning rates as they are before a step that is left out, to be put back after it."""

    def __init__(self, optimizer: Any, scheduler: Any):
        self._optimizer, self._scheduler = optimizer, scheduler
        self._state = copy.deepcopy(scheduler.state_dict())
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def put_back(self) -> None:
        """Undo the scheduler's step."""
        self._scheduler.load_state_dict(self._state)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate


def whole_tensor(value: Any) -> Any:
    """Return a tensor that every rank has in full, from one that may be sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def drop_gradients(model: nn.Module) -> None:
    """Remove the gradients: torch's optimisers pass over parameters without one."""
    for parameter in model.parameters():
        parameter.grad = None


def bad_weights(model: nn.Module) -> list[str]:
    """Return the names of trained parameters that hold NaN or infinity, as this rank has them."""
    names, finite = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            names.append(name)
            finite.append(value.detach().isfinite().all())
    if not finite or bool(torch.stack(finite).all()):
        return []
    return [name for name, good in zip(names, finite, strict=True) if not good]
