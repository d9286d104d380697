"""Inner optimisers as pure functions, and the loop that runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import tree
from metafocus.autodiff import value_and_grad
from metafocus.errors import ProblemError
from metafocus.types import InnerLoss, Params, Solver, State

Rate = float | Callable[[Params], Tensor | Params]
"""A learning rate: a number, or a function of the outer parameters (learned rates)."""

Clip = Callable[[Params], Params]


@dataclass(frozen=True)
class clip_per_tensor:
    """Scale each gradient tensor to a norm of at most `limit`: `g * min(1, limit / |g|)`."""

    limit: float

    def __post_init__(self):
        _positive("limit", self.limit)

    def __call__(self, grads: Params) -> Params:
        """Clip."""
        return {k: g * _shrink((g * g).sum(), self.limit) for k, g in grads.items()}


@dataclass(frozen=True)
class clip_global:
    """Scale all gradients together to a norm of at most `limit`."""

    limit: float

    def __post_init__(self):
        _positive("limit", self.limit)

    def __call__(self, grads: Params) -> Params:
        """Clip."""
        return tree.scale(grads, _shrink(tree.dot(grads, grads), self.limit))


def _shrink(square: Tensor, limit: float) -> Tensor:
    # On squares and with a guarded square root, so that a zero gradient has derivatives of every
    # order; the plain form is 0 * inf there.
    active = square > limit * limit
    return torch.where(active, limit * torch.rsqrt(torch.where(active, square, 1.0)), 1.0)


@dataclass(frozen=True)
class SGD:
    """Gradient descent, with the formulas of `torch.optim.SGD`.

    `g = clip(grad) + weight_decay * p;  b = momentum * b + g;  p = p - lr * b`
    (`p - lr * (g + momentum * b)` with Nesterov).

    Args:
        lr: a number, or a function of the outer parameters that returns a scalar or one tensor
            for each fast weight (Meta-SGD, arXiv 1707.09835); it is differentiated.
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

    def __post_init__(self):
        _check(self.lr, self.steps, self.weight_decay)
        _fraction("momentum", self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs momentum > 0, got momentum=0.0.")

    def init(self, params: Params) -> State:
        """Return zero velocities, or nothing without momentum."""
        return tree.zeros_like(params) if self.momentum else {}

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Return the fast weights and velocities after one step."""
        if self.clip is not None:
            grads = self.clip(grads)
        if self.weight_decay:
            grads = tree.add(grads, params, self.weight_decay)
        if self.momentum:
            state = tree.add(grads, state, self.momentum)
            grads = tree.add(grads, state, self.momentum) if self.nesterov else state
        rate = rates(self.lr, outer, params)
        return {k: p - rate[k] * grads[k] for k, p in params.items()}, state


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
    """

    lr: Rate
    steps: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: Clip | None = None

    def __post_init__(self):
        _check(self.lr, self.steps, self.weight_decay)
        for beta in self.betas:
            _fraction("betas", beta)
        _positive("eps", self.eps)

    def init(self, params: Params) -> State:
        """Return zero first and second moments."""
        return tree.zeros_like(params), tree.zeros_like(params)

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Return the fast weights and moments after one step."""
        if self.clip is not None:
            grads = self.clip(grads)
        (b1, b2), (first, second) = self.betas, state
        first = {k: b1 * first[k] + (1 - b1) * g for k, g in grads.items()}
        second = {k: b2 * second[k] + (1 - b2) * g * g for k, g in grads.items()}
        unbias1, unbias2 = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
        rate = rates(self.lr, outer, params)
        new = {}
        for k, p in params.items():
            direction = first[k] / unbias1 / (safe_sqrt(second[k] / unbias2) + self.eps)
            if self.weight_decay:
                direction = direction + self.weight_decay * p
            new[k] = p - rate[k] * direction
        return new, (first, second)


def safe_sqrt(x: Tensor) -> Tensor:
    """Return the square root with the derivative 0 at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def rates(lr: Rate, outer: Params, params: Params) -> dict[str, Any]:
    """Return the learning rate of every fast weight.

    Raises:
        ProblemError: if `lr(outer)` is neither a scalar nor a dict with every fast weight.
    """
    value = lr(outer) if callable(lr) else lr
    if isinstance(value, dict):
        if set(value) != set(params):
            odd = sorted(set(value) ^ set(params))
            raise ProblemError(
                f"lr(outer) must return one rate for each fast weight; {odd[0]!r} is on one side "
                f"only. Fast weights: {sorted(params)}."
            )
        return value
    if isinstance(value, Tensor) and value.ndim:
        raise ProblemError(
            f"lr(outer) must return a scalar or a dict of rates, got shape {list(value.shape)}."
        )
    return dict.fromkeys(params, value)


def descend(
    inner_loss: InnerLoss,
    solver: Solver,
    params: Params,
    state: State,
    outer: Params,
    support: Any,
    steps: Iterable[int],
    *,
    differentiable: bool,
) -> tuple[Params, State, list[Tensor]]:
    """Run inner steps; return fast weights, solver state and the loss before each step."""
    losses = []
    for step in steps:
        value, grads = value_and_grad(
            lambda p: inner_loss(p, outer, support), params, differentiable=differentiable
        )
        params, state = solver.update(params, grads, state, step, outer)
        if not differentiable:
            # A learned rate may close over a tensor that requires grad.
            params, state = tree.detach(params), tree.detach(state)
        losses.append(value)
    return params, state, losses


def stacked(losses: list[Tensor], like: Params) -> Tensor:
    """Return the losses as one tensor of shape `[steps]`; `like` gives the device if empty."""
    if losses:
        return torch.stack(losses)
    some = next(iter(like.values()), None)
    return torch.zeros(0) if some is None else some.new_zeros(0)


def count(solver: Solver, params: Params) -> int:
    """Return the number of steps: none where there is nothing to adapt."""
    return solver.steps if params else 0


def _check(lr: Rate, steps: int, weight_decay: float) -> None:
    if not callable(lr) and not lr >= 0:
        raise ValueError(
            f"lr must be a number >= 0 or a function of the outer parameters, got {lr}."
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer >= 0 (0: no adaptation), got {steps!r}.")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}.")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}.")


def _fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")
