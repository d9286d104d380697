"""Gradient descent as a pure function, with the formula of `torch.optim.SGD`."""

from __future__ import annotations

from dataclasses import dataclass

from metafocus import params as pt
from metafocus.checks import fraction
from metafocus.solvers.clipping import Clip
from metafocus.solvers.rates import Rate, check_settings, rates
from metafocus.solvers.stepping import all_moved, coupled, moved
from metafocus.types import Params, State


@dataclass(frozen=True)
class SGD:
    """Gradient descent, with the formulas of `torch.optim.SGD`.

    `g = clip(grad) + weight_decay * p;  b = momentum * b + g;  p = p - lr * b`
    (`p - lr * (g + momentum * b)` with Nesterov).

    Args:
        lr: a number; a function of the outer parameters that returns a scalar or one rate for
            each fast weight, which is differentiated (Meta-SGD, arXiv 1707.09835); or
            `per_step(fn)` with a function of the outer parameters and the step's number.
        steps: how many inner steps; 0 means no adaptation.
        momentum: factor of the velocity.
        nesterov: look ahead along the velocity.
        weight_decay: coupled, as in `torch.optim.SGD`.
        clip: None, `clip_per_tensor(c)`, `clip_global(c)` or a function of the gradients.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> SGD(0.1, steps=5, momentum=0.9).steps
        5
    """

    lr: Rate
    steps: int
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip: Clip | None = None

    def __post_init__(self) -> None:
        check_settings(self.lr, self.steps, self.weight_decay, self.clip)
        fraction("momentum", self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs momentum > 0, got momentum=0.0.")

    def init(self, params: Params) -> State:
        """Return zero velocities, or nothing without momentum."""
        return pt.zeros_like(params) if self.momentum else {}

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Return the fast weights and velocities after one step."""
        grads = coupled(grads, params, self.clip, self.weight_decay)
        if self.momentum:
            state = all_moved(grads, self.momentum, state)
            grads = all_moved(grads, self.momentum, state) if self.nesterov else state
        if isinstance(self.lr, int | float):
            return all_moved(params, -self.lr, grads), state
        rate = rates(self.lr, outer, params, step)
        return {k: moved(p, -rate[k], grads[k]) for k, p in params.items()}, state
