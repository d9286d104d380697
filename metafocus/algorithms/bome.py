"""BOME: descend on the outer loss under a dynamic barrier for the inner one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from metafocus import params as pt
from metafocus.algorithms.common import (
    StepAux,
    check_stationarity,
    fast_gradient,
    gradients,
    levels,
    start,
)
from metafocus.algorithms.first_step import SingleLoop
from metafocus.calls import attempted
from metafocus.checks import positive, whole
from metafocus.engine.checked_parts import check_problem
from metafocus.problem import constants
from metafocus.types import Params


class BOMEState(NamedTuple):
    """The fast weights, which descend together with the outer parameters."""

    fast: Params


@dataclass(frozen=True)
class BOME(SingleLoop):
    """BOME: first-order, both levels along `grad F + multiplier grad q`, a barrier on `q`.

    `q(fast, outer) = G(fast, outer) - G(best, outer)`, `best` being `fast` after `inner_steps`
    gradient steps on `G`, held constant. The multiplier
    `max(eta - <grad F, grad q> / |grad q|^2, 0)` is the smallest that makes `q` fall at the rate
    `eta |grad q|^2`. Then `fast -= fast_lr (grad_fast F + multiplier grad_fast q)` and
    `g = grad_outer F + multiplier grad_outer q`.

    The theory takes the same rate for both levels: plain SGD with `lr = fast_lr` outside. Near
    the solution the multiplier grows without bound, so with constant rates the iterates settle
    at a distance proportional to `fast_lr`; lower both rates to come nearer. Too few
    `inner_steps` leave a bias of their own, as `best` is then not the minimum.

    Args:
        problem: the bilevel problem; `init` gives the first fast weights.
        inner_lr: rate of the steps towards `best`.
        fast_lr: rate of the fast weights.
        eta: how fast the barrier makes the inner problem fall.
        inner_steps: steps towards `best`.

    The `residual` of `StepAux` is `|grad q|`.

    Raises:
        ValueError: for a rate, an eta or a number of steps that is not positive.

    Example:
        >>> import metafocus as mf
        >>> def inner(fast, slow, x):
        ...     return ((fast["w"] - slow["a"]) ** 2).sum()
        >>> def upper(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> problem = mf.Problem(inner, upper, init=lambda slow, _: {"w": torch.zeros(1)})
        >>> bome = mf.algorithms.BOME(problem, inner_lr=0.3, fast_lr=0.05)
        >>> outer = {"a": torch.tensor([0.5])}
        >>> state = bome.init(outer)
        >>> for _ in range(200):
        ...     grads, state, aux = bome.step(outer, state, mf.Episode(None, torch.ones(1)))
        ...     outer = {"a": outer["a"] - 0.05 * grads["a"]}
        >>> bool((outer["a"] - 1).abs() < 0.05)
        True

    References:
        Ye, Liu, Wright, Stone and Liu, arXiv 2209.08709.
    """

    inner_lr: float
    fast_lr: float
    eta: float = 0.5
    inner_steps: int = 10

    def __post_init__(self) -> None:
        check_problem(self.problem)
        positive("inner_lr", self.inner_lr)
        positive("fast_lr", self.fast_lr)
        positive("eta", self.eta)
        whole("inner_steps", self.inner_steps, 1)

    @attempted
    def init(self, outer: Params, support: Any = None) -> BOMEState:
        """Return the state before the first step."""
        return BOMEState(start(self.problem, outer, support))

    @attempted
    def step(
        self, outer: Params, state: BOMEState, episode: Any
    ) -> tuple[Params, BOMEState, StepAux]:
        """Return the outer gradient, the next state and aux, all detached.

        Raises:
            NonFiniteError: outside transforms, if the inner gradient is NaN or infinite.
        """
        outer, fast = constants(outer), pt.detach(state.fast)
        self.check(outer, fast, episode, twice=False)
        inner, upper = levels(self.problem, episode)
        with torch.no_grad():
            best = fast
            for _ in range(self.inner_steps):
                _, slope = fast_gradient(inner, best, outer)
                best = pt.add(best, slope, -self.inner_lr)
            loss, pull, direct = gradients(upper, fast, outer)
            _, q_fast, here = gradients(inner, fast, outer)
            _, _, there = gradients(inner, best, outer)
            q_outer = pt.sub(here, there)
            square = pt.dot(q_fast, q_fast) + pt.dot(q_outer, q_outer)
            along = pt.dot(pull, q_fast) + pt.dot(direct, q_outer)
            barrier = torch.clamp(self.eta - along / square, min=0.0)
            # At the exact inner minimum there is nothing to keep, and 0 / 0.
            multiplier = torch.where(square > 0, barrier, 0.0)
            aux = StepAux(loss, pt.norm(q_fast), square.sqrt())
            check_stationarity(aux.stationarity)
            move = pt.add(pull, q_fast, multiplier)
            after = BOMEState(pt.add(fast, move, -self.fast_lr))
            return pt.add(direct, q_outer, multiplier), after, aux
