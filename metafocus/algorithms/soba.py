"""SOBA: inner problem, linear system and outer problem move together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from metafocus import params as pt
from metafocus.algorithms.common import (
    StepAux,
    check_stationarity,
    free,
    gradients,
    levels,
    start,
)
from metafocus.algorithms.first_step import SingleLoop
from metafocus.autodiff.hvp import differentiates_twice, hvp_reverse
from metafocus.calls import attempted
from metafocus.checks import positive
from metafocus.engine.checked_parts import check_problem
from metafocus.problem import constants
from metafocus.types import HVP, Params


class SOBAState(NamedTuple):
    """Fast weights, and `v`, which tends to `-H^-1 grad_fast outer_loss`."""

    fast: Params
    v: Params


@dataclass(frozen=True)
class SOBA(SingleLoop):
    """SOBA: stochastic gradient steps on the inner problem, the linear system and the outer one.

    With inner loss `G`, outer loss `F` and everything at the old `(fast, v, outer)`:
    `fast -= inner_lr grad_fast G;  v -= v_lr (H v + grad_fast F);  g = M' v + grad_outer F`,
    `H` the Hessian of `G` by `fast` and `M` its mixed derivative. One gradient of each loss and
    one linearised product a step. With constant rates and batches it stops at a noise floor that
    falls with the rates; lower them between steps by `dataclasses.replace(soba, inner_lr=...)`.

    Args:
        problem: the bilevel problem; `init` gives the first fast weights.
        inner_lr: rate of the inner problem.
        v_lr: rate of the linear system.
        hvp: how to multiply with second derivatives.

    The `residual` of `StepAux` is `|H v + grad_fast F|`.

    Raises:
        ValueError: for a rate that is not positive.

    Example:
        >>> import metafocus as mf
        >>> def inner(fast, slow, x):
        ...     return ((fast["w"] - slow["a"]) ** 2).sum()
        >>> def upper(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> problem = mf.Problem(inner, upper, init=lambda slow, _: {"w": torch.zeros(1)})
        >>> soba = mf.algorithms.SOBA(problem, inner_lr=0.3, v_lr=0.3)
        >>> outer = {"a": torch.zeros(1, requires_grad=True)}
        >>> optimizer = torch.optim.SGD(outer.values(), lr=0.1)
        >>> state = soba.init(outer)
        >>> for _ in range(100):
        ...     grads, state, aux = soba.step(outer, state, mf.Episode(None, torch.ones(1)))
        ...     outer["a"].grad = grads["a"]
        ...     optimizer.step()
        >>> outer["a"].detach()
        tensor([1.0000])

    References:
        Dagréou, Ablin, Vaiter and Moreau, arXiv 2201.13409.
    """

    inner_lr: float
    v_lr: float
    hvp: HVP = hvp_reverse

    def __post_init__(self) -> None:
        check_problem(self.problem)
        positive("inner_lr", self.inner_lr)
        positive("v_lr", self.v_lr)

    @attempted
    def init(self, outer: Params, support: Any = None) -> SOBAState:
        """Return the state before the first step, with `v = 0`."""
        fast = start(self.problem, outer, support)
        return SOBAState(fast, pt.zeros_like(fast))

    @attempted
    def step(
        self, outer: Params, state: SOBAState, episode: Any
    ) -> tuple[Params, SOBAState, StepAux]:
        """Return the outer gradient, the next state and aux, all detached.

        Raises:
            NonFiniteError: outside transforms, if the inner gradient is NaN or infinite.
        """
        outer, (fast, v) = constants(outer), pt.detach(state)
        self.check(outer, fast, episode, twice=differentiates_twice(self.hvp))
        inner, upper = levels(self.problem, episode)
        with torch.no_grad():
            gradient, product = self.hvp(inner, fast, outer)
            curvature, mixed = product(v)
            loss, pull, direct = gradients(upper, fast, outer)
            slope = pt.add(curvature, pull)
            aux = StepAux(loss, pt.norm(gradient), pt.norm(slope))
            check_stationarity(aux.stationarity)
            after = SOBAState(pt.add(fast, gradient, -self.inner_lr), pt.add(v, slope, -self.v_lr))
            return pt.add(direct, free(outer, mixed)), after, aux
