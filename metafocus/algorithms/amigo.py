"""AmIGO: a few warm-started steps on the inner problem and on the linear system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from metafocus import params as pt
from metafocus.algorithms.common import StepAux, start
from metafocus.algorithms.implicit_steps import ImplicitSteps
from metafocus.calls import attempted
from metafocus.types import Params


class AmIGOState(NamedTuple):
    """Fast weights, and `v`, which tends to `-H^-1 grad_fast outer_loss`; both warm-started."""

    fast: Params
    v: Params


@dataclass(frozen=True)
class AmIGO(ImplicitSteps):
    """AmIGO: amortised implicit differentiation, every solve started where the last one ended.

    `inner_steps` times `fast -= inner_lr grad_fast G`; then, at the new `fast`, `v_steps` times
    `v -= v_lr (H v + grad_fast F)`; then `g = grad_outer F + M' v`. As the outer parameters
    move slowly, a few steps suffice where a cold start needs about `cond(H) log(1 / error)`.

    Args:
        problem: the bilevel problem; `init` gives the first fast weights.
        inner_lr: rate of the inner problem.
        v_lr: rate of the linear system.
        inner_steps: steps on the inner problem.
        v_steps: steps on the linear system, one Hessian product each.
        hvp: how to multiply with second derivatives.
        fresh: False uses the whole support in every step. True: support holds
            `inner_steps + v_steps + 1` batches stacked on axis 0, used in this order, the last
            one for `M' v`.

    The `stationarity` of `StepAux` is taken after the inner steps, its `residual` is
    `|H v + grad_fast F|` before the last of the steps on `v`.

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
        >>> amigo = mf.algorithms.AmIGO(problem, inner_lr=0.3, v_lr=0.3, inner_steps=20, v_steps=20)
        >>> outer, episode = {"a": torch.zeros(1)}, mf.Episode(None, torch.ones(1))
        >>> grads, state, aux = amigo.step(outer, amigo.init(outer), episode)
        >>> grads["a"]
        tensor([-2.])

    References:
        Arbel and Mairal, arXiv 2111.14580.
    """

    @attempted
    def init(self, outer: Params, support: Any = None) -> AmIGOState:
        """Return the state before the first step, with `v = 0`."""
        fast = start(self.problem, outer, support)
        return AmIGOState(fast, pt.zeros_like(fast))

    @attempted
    def step(
        self, outer: Params, state: AmIGOState, episode: Any
    ) -> tuple[Params, AmIGOState, StepAux]:
        """Return the outer gradient, the next state and aux, all detached.

        Raises:
            ProblemError: with `fresh`, if support holds another number of batches.
            NonFiniteError: outside transforms, if the inner gradient is NaN or infinite.
        """
        grads, fast, v, aux = self.solve(outer, state.fast, state.v, episode)
        return grads, AmIGOState(fast, v), aux
