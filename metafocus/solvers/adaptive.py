"""RMSprop and Adagrad as pure functions, with the formulas of `torch.optim`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metafocus import params as pt
from metafocus.autodiff.guarded import safe_sqrt
from metafocus.checks import fraction, not_negative, positive
from metafocus.solvers.clipping import Clip
from metafocus.solvers.rates import Rate, check_settings, rates
from metafocus.solvers.stepping import all_moved, coupled, moved
from metafocus.types import Params, State


@dataclass(frozen=True)
class RMSprop:
    """Gradients over their running root mean square, with the formulas of `torch.optim.RMSprop`.

    `g = clip(grad) + weight_decay * p;  v = alpha v + (1-alpha) g^2;`
    `b = momentum * b + g / (sqrt(v) + eps);  p = p - lr * b`;
    centered: `sqrt(v - a^2)` with `a = alpha a + (1-alpha) g`.

    The derivative of the square root at 0 is taken as 0, as in `Adam`. Where rounding makes
    `v - a^2` negative, its root is 0; torch gives NaN.

    Args:
        lr: as for `SGD`.
        steps: how many inner steps; 0 means no adaptation.
        alpha: decay of the running means.
        eps: added to the root.
        momentum: factor of the velocity.
        centered: divide by the running standard deviation instead.
        weight_decay: coupled, as in `torch.optim.RMSprop`.
        clip: as for `SGD`.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> RMSprop(1e-2, steps=5, centered=True).alpha
        0.99

    Tieleman and Hinton, Coursera lecture 6.5 (2012); centered: Graves (arXiv 1308.0850).
    """

    lr: Rate
    steps: int
    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    weight_decay: float = 0.0
    clip: Clip | None = None

    def __post_init__(self) -> None:
        check_settings(self.lr, self.steps, self.weight_decay, self.clip)
        fraction("alpha", self.alpha)
        fraction("momentum", self.momentum)
        positive("eps", self.eps)

    def init(self, params: Params) -> State:
        """Return a zero mean square and, where needed, a zero mean and velocity."""
        mean = pt.zeros_like(params) if self.centered else {}
        velocity = pt.zeros_like(params) if self.momentum else {}
        return pt.zeros_like(params), mean, velocity

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Return the fast weights and running means after one step."""
        square, mean, velocity = state
        grads = coupled(grads, params, self.clip, self.weight_decay)
        square = {k: self.alpha * square[k] + (1 - self.alpha) * g * g for k, g in grads.items()}
        variance = square
        if self.centered:
            mean = {k: self.alpha * mean[k] + (1 - self.alpha) * g for k, g in grads.items()}
            variance = {k: square[k] - m * m for k, m in mean.items()}
        direction = {k: g / (safe_sqrt(variance[k]) + self.eps) for k, g in grads.items()}
        if self.momentum:
            direction = velocity = all_moved(direction, self.momentum, velocity)
        rate = rates(self.lr, outer, params, step)
        new = {k: moved(p, -rate[k], direction[k]) for k, p in params.items()}
        return new, (square, mean, velocity)


@dataclass(frozen=True)
class Adagrad:
    """Gradients over the root of the sum of their squares, as in `torch.optim.Adagrad`.

    `g = clip(grad) + weight_decay * p;  v = v + g^2;`
    `p = p - lr / (1 + t * lr_decay) * g / (sqrt(v) + eps)` for `t = 0, 1, ...`.

    The derivative of the square root at 0 is taken as 0, as in `Adam`; with `initial > 0` the
    root is never at 0.

    Args:
        lr: as for `SGD`.
        steps: how many inner steps; 0 means no adaptation.
        lr_decay: how fast the rate falls.
        eps: added to the root.
        initial: the sum of squares before the first step.
        weight_decay: coupled, as in `torch.optim.Adagrad`.
        clip: as for `SGD`.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> Adagrad(1e-2, steps=5).init({"w": torch.ones(2)})["w"]
        tensor([0., 0.])

    Duchi, Hazan and Singer, JMLR 12 (2011).
    """

    lr: Rate
    steps: int
    lr_decay: float = 0.0
    eps: float = 1e-10
    initial: float = 0.0
    weight_decay: float = 0.0
    clip: Clip | None = None

    def __post_init__(self) -> None:
        check_settings(self.lr, self.steps, self.weight_decay, self.clip)
        not_negative("lr_decay", self.lr_decay)
        not_negative("initial", self.initial)
        positive("eps", self.eps)

    def init(self, params: Params) -> State:
        """Return the sums of squares before the first step."""
        return {k: torch.full_like(v, self.initial) for k, v in params.items()}

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Return the fast weights and sums of squares after one step."""
        grads = coupled(grads, params, self.clip, self.weight_decay)
        state = {k: state[k] + g * g for k, g in grads.items()}
        rate, slower = rates(self.lr, outer, params, step), 1 + step * self.lr_decay
        new = {
            k: p - rate[k] / slower * grads[k] / (safe_sqrt(state[k]) + self.eps)
            for k, p in params.items()
        }
        return new, state
