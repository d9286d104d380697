"""Inner optimisers as pure functions with the formulas of `torch.optim`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metafocus import tree
from metafocus.solvers.stepping import (
    Clip,
    Rate,
    check_common,
    fraction,
    not_negative,
    positive,
    rates,
    safe_sqrt,
)
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
        check_common(self.lr, self.steps, self.weight_decay)
        fraction("momentum", self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs momentum > 0, got momentum=0.0.")

    def init(self, params: Params) -> State:
        """Return zero velocities, or nothing without momentum."""
        return tree.zeros_like(params) if self.momentum else {}

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Return the fast weights and velocities after one step."""
        grads = coupled(grads, params, self.clip, self.weight_decay)
        if self.momentum:
            state = _all_moved(grads, self.momentum, state)
            grads = _all_moved(grads, self.momentum, state) if self.nesterov else state
        rate = rates(self.lr, outer, params, step)
        return {k: _moved(p, -rate[k], grads[k]) for k, p in params.items()}, state


@dataclass(frozen=True)
class Adam:
    """Adam with decoupled weight decay, with the formulas of `torch.optim.AdamW`.

    `m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;`
    `p = p (1 - lr * weight_decay) - lr * m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps)`.

    The derivative of the square root at 0 is taken as 0, so an entry whose gradient has always
    been zero gives finite derivatives of every order.

    Args:
        lr: as for `SGD`.
        steps: how many inner steps; 0 means no adaptation.
        betas: decay of the two moments.
        eps: added to the root.
        weight_decay: decoupled, as in AdamW.
        clip: as for `SGD`.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> Adam(1e-3, steps=5) == AdamW(1e-3, steps=5, weight_decay=0.0)
        True

    Adam (arXiv 1412.6980), decoupled decay (arXiv 1711.05101).
    """

    lr: Rate
    steps: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: Clip | None = None

    def __post_init__(self) -> None:
        check_common(self.lr, self.steps, self.weight_decay)
        for beta in self.betas:
            fraction("betas", beta)
        positive("eps", self.eps)

    def init(self, params: Params) -> State:
        """Return zero first and second moments."""
        return tree.zeros_like(params), tree.zeros_like(params)

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Return the fast weights and moments after one step."""
        if self.clip is not None:
            grads = self.clip(grads)
        direction, state = adam_direction(grads, state, step, self.betas, self.eps)
        if self.weight_decay:
            direction = tree.add(direction, params, self.weight_decay)
        rate = rates(self.lr, outer, params, step)
        return {k: _moved(p, -rate[k], direction[k]) for k, p in params.items()}, state


def AdamW(
    lr: Rate,
    steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip: Clip | None = None,
) -> Adam:
    """Return `Adam` with the default weight decay of `torch.optim.AdamW`.

    `p = p (1 - lr * weight_decay) - lr * m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps)`.

    Args:
        lr: as for `SGD`.
        steps: how many inner steps; 0 means no adaptation.
        betas: decay of the two moments.
        eps: added to the root.
        weight_decay: decoupled.
        clip: as for `SGD`.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> AdamW(1e-3, steps=5).weight_decay
        0.01

    Decoupled weight decay regularization (arXiv 1711.05101).
    """
    return Adam(lr, steps, betas, eps, weight_decay, clip)


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
        check_common(self.lr, self.steps, self.weight_decay)
        fraction("alpha", self.alpha)
        fraction("momentum", self.momentum)
        positive("eps", self.eps)

    def init(self, params: Params) -> State:
        """Return a zero mean square and, where needed, a zero mean and velocity."""
        mean = tree.zeros_like(params) if self.centered else {}
        velocity = tree.zeros_like(params) if self.momentum else {}
        return tree.zeros_like(params), mean, velocity

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
            direction = velocity = _all_moved(direction, self.momentum, velocity)
        rate = rates(self.lr, outer, params, step)
        new = {k: _moved(p, -rate[k], direction[k]) for k, p in params.items()}
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
        check_common(self.lr, self.steps, self.weight_decay)
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


def _all_moved(a: Params, by: float, b: Params) -> Params:
    """Return `a + by * b`."""
    return {k: _moved(a[k], by, b[k]) for k in a}


def _moved(a: Tensor, by: float | Tensor, b: Tensor) -> Tensor:
    # One kernel and one node of the graph; a learned rate is a tensor and needs two.
    return a + by * b if isinstance(by, Tensor) else torch.add(a, b, alpha=by)


def coupled(grads: Params, params: Params, clip: Clip | None, weight_decay: float) -> Params:
    """Return the clipped gradients of `loss + weight_decay / 2 |p|^2`, the decay not clipped."""
    if clip is not None:
        grads = clip(grads)
    return tree.add(grads, params, weight_decay) if weight_decay else grads


def adam_direction(
    grads: Params, state: State, step: int, betas: tuple[float, float], eps: float
) -> tuple[Params, State]:
    """Return Adam's bias-corrected direction and its moments after one step."""
    (b1, b2), (first, second) = betas, state
    first = {k: b1 * first[k] + (1 - b1) * g for k, g in grads.items()}
    second = {k: b2 * second[k] + (1 - b2) * g * g for k, g in grads.items()}
    unbias1, unbias2 = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
    direction = {k: m / unbias1 / (safe_sqrt(second[k] / unbias2) + eps) for k, m in first.items()}
    return direction, (first, second)
