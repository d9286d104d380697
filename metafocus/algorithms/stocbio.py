"""stocBiO: warm-started inner steps and a Neumann series for the linear system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from metafocus import params as pt
from metafocus.algorithms.common import StepAux, start
from metafocus.algorithms.implicit_steps import ImplicitSteps
from metafocus.calls import attempted
from metafocus.types import Params


class StocBiOState(NamedTuple):
    """Fast weights, warm-started; the linear system starts anew at each step."""

    fast: Params


@dataclass(frozen=True)
class StocBiO(ImplicitSteps):
    """stocBiO: `AmIGO` without memory of the linear system, which becomes a Neumann series.

    `inner_steps` times `fast -= inner_lr grad_fast G`; then
    `v = -v_lr sum_(q<v_steps) (I - v_lr H)^q grad_fast F`; then `g = grad_outer F + M' v`. The
    estimate has a bias that falls as `|I - v_lr H|^v_steps`, at every step the same.

    Args:
        problem: the bilevel problem; `init` gives the first fast weights.
        inner_lr: rate of the inner problem.
        v_lr: scale of the series, below `2 / max eigenvalue of H`.
        inner_steps: steps on the inner problem.
        v_steps: terms of the series, one Hessian product each.
        hvp: how to multiply with second derivatives.
        fresh: as for `AmIGO`; the paper draws a new batch for every factor of the series.

    `StepAux` as for `AmIGO`.

    Raises:
        ValueError: for a rate or a number of steps that is not positive.

    Example:
        >>> import torch
        >>> import metafocus as mf
        >>> def inner(fast, slow, x):
        ...     return ((fast["w"] - slow["a"]) ** 2).sum()
        >>> def upper(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> problem = mf.Problem(inner, upper, init=lambda slow, _: {"w": torch.zeros(1)})
        >>> stocbio = mf.algorithms.StocBiO(
        ...     problem, inner_lr=0.3, v_lr=0.25, inner_steps=20, v_steps=2)
        >>> outer, episode = {"a": torch.zeros(1)}, mf.Episode(None, torch.ones(1))
        >>> grads, state, aux = stocbio.step(outer, stocbio.init(outer), episode)
        >>> grads["a"]
        tensor([-1.5000])

    References:
        Ji, Yang and Liang, arXiv 2010.07962.
    """

    @attempted
    def init(self, outer: Params, support: Any = None) -> StocBiOState:
        """Return the state before the first step."""
        return StocBiOState(start(self.problem, outer, support))

    @attempted
    def step(
        self, outer: Params, state: StocBiOState, episode: Any
    ) -> tuple[Params, StocBiOState, StepAux]:
        """Return the outer gradient, the next state and aux; errors as for `AmIGO.step`."""
        zeros = pt.zeros_like(state.fast)
        grads, fast, _, aux = self.solve(outer, state.fast, zeros, episode)
        return grads, StocBiOState(fast), aux
