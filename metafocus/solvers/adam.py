"""Adam and AdamW as pure functions, with the formula of `torch.optim.AdamW`."""

from __future__ import annotations

from dataclasses import dataclass

from metafocus import params as pt
from metafocus.autodiff.guarded import safe_sqrt
from metafocus.checks import fraction, positive
from metafocus.solvers.clipping import Clip
from metafocus.solvers.rates import Rate, check_settings, rates
from metafocus.solvers.stepping import moved
from metafocus.types import Params, State


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
        >>> Adam(1e-3, steps=5).weight_decay
        0.0

    Adam (arXiv 1412.6980), decoupled decay (arXiv 1711.05101).
    """

    lr: Rate
    steps: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: Clip | None = None

    def __post_init__(self) -> None:
        check_settings(self.lr, self.steps, self.weight_decay, self.clip)
        for beta in self.betas:
            fraction("betas", beta)
        positive("eps", self.eps)

    def init(self, params: Params) -> State:
        """Return zero first and second moments."""
        return pt.zeros_like(params), pt.zeros_like(params)

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Return the fast weights and moments after one step."""
        if self.clip is not None:
            grads = self.clip(grads)
        direction, state = adam_direction(grads, state, step, self.betas, self.eps)
        if self.weight_decay:
            direction = pt.add(direction, params, self.weight_decay)
        rate = rates(self.lr, outer, params, step)
        return {k: moved(p, -rate[k], direction[k]) for k, p in params.items()}, state


@dataclass(frozen=True)
class AdamW(Adam):
    """`Adam` with the default weight decay of `torch.optim.AdamW`.

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

    weight_decay: float = 0.01


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
