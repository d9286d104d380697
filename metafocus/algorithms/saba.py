"""SABA: SOBA with the memory of SAGA, for finite sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.algorithms.common import (
    StepAux,
    check_stationarity,
    free,
    gradients,
    levels,
    select,
    start,
)
from metafocus.algorithms.finite_sum import Term, terms
from metafocus.algorithms.first_step import SingleLoop
from metafocus.autodiff.hvp import differentiates_twice, hvp_reverse
from metafocus.calls import attempted
from metafocus.checks import positive
from metafocus.engine.checked_parts import check_problem
from metafocus.episodes import as_episode
from metafocus.errors import ProblemError
from metafocus.problem import constants
from metafocus.types import HVP, Episode, Params


class InnerTerms(NamedTuple):
    """What an inner term contributes: its gradient, `H_i v` and `M_i' v`."""

    gradient: Params
    curvature: Params
    mixed: Params


class OuterTerms(NamedTuple):
    """What an outer term contributes: its gradients by the fast and the outer parameters."""

    fast: Params
    outer: Params


class SABAState(NamedTuple):
    """Fast weights, `v` as in `SOBA`, and what each term contributed last.

    Attributes:
        fast: the fast weights.
        v: tends to `-H^-1 grad_fast outer_loss`.
        inner: of the `n` inner terms, stacked on axis 0.
        outer: of the `m` outer terms, stacked on axis 0.
    """

    fast: Params
    v: Params
    inner: InnerTerms
    outer: OuterTerms


@dataclass(frozen=True)
class SABA(SingleLoop):
    """SABA: SOBA on finite sums, its directions variance-reduced as in SAGA.

    With inner loss `mean_i G_i`, outer loss `mean_j F_j` and one term of each a step, every
    expectation that SOBA needs is estimated by `new_i - memory_i + mean(memory)`, and `memory_i`
    becomes `new_i`. The noise vanishes at the solution: linear convergence with constant rates
    where the value function is strongly convex, at the cost of one term of each sum a step.

    A term is whatever the losses take as data: an example or a mini-batch of a fixed partition.
    Memory is `n (2 fast + outer) + m (fast + outer)` numbers; it is copied at each step, as the
    step is pure.

    Args:
        problem: the bilevel problem; its losses see the data of one term.
        inner_lr: rate of the inner problem.
        v_lr: rate of the linear system.
        hvp: how to multiply with second derivatives.

    The `residual` of `StepAux` is the norm of the estimate of `H v + grad_fast F`, `loss` and
    `stationarity` are estimates too.

    Raises:
        ValueError: for a rate that is not positive.

    Example:
        >>> import metafocus as mf
        >>> def inner(fast, slow, x):
        ...     return ((fast["w"] - slow["a"] - x) ** 2).sum()
        >>> def upper(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> problem = mf.Problem(inner, upper, init=lambda slow, support: {"w": torch.zeros(())})
        >>> saba = mf.algorithms.SABA(problem, inner_lr=0.1, v_lr=0.1)
        >>> data = mf.Episode(torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 2.0, 3.0]))
        >>> outer, generator = {"a": torch.zeros(())}, torch.Generator().manual_seed(0)
        >>> state = saba.init(outer, data)
        >>> for _ in range(400):
        ...     episode = mf.algorithms.draw(data, generator=generator)
        ...     grads, state, aux = saba.step(outer, state, episode)
        ...     outer = {"a": outer["a"] - 0.05 * grads["a"]}
        >>> outer["a"]
        tensor(2.0000)

    References:
        Dagréou, Ablin, Vaiter and Moreau, arXiv 2201.13409; Defazio et al., arXiv 1407.0202
        (SAGA).
    """

    inner_lr: float
    v_lr: float
    hvp: HVP = hvp_reverse

    def __post_init__(self) -> None:
        check_problem(self.problem)
        positive("inner_lr", self.inner_lr)
        positive("v_lr", self.v_lr)

    @attempted
    def init(self, outer: Params, data: Any) -> SABAState:
        """Return the state with `v = 0` and a full memory; one pass over all terms.

        Args:
            outer: the outer parameters.
            data: an episode with all terms of support and query stacked on axis 0.

        Raises:
            ProblemError: if the tensors of one half disagree about the number of terms.
        """
        support, query = as_episode(data)
        counts = terms(support, "support"), terms(query, "query")
        # `prepare` may look at both halves: each inner term goes with the first outer term.
        one = [select(half, 0) for half in (support, query)]
        fast, outer = start(self.problem, outer, one[0]), constants(outer)
        self.check(outer, fast, Episode(*one), twice=differentiates_twice(self.hvp))
        v = pt.zeros_like(fast)

        def inner(own: Any) -> InnerTerms:
            return self._inner(fast, v, outer, Episode(own, one[1]))

        def upper(own: Any) -> OuterTerms:
            return self._outer(fast, outer, Episode(one[0], own))[1]

        with torch.no_grad():
            return SABAState(
                fast, v, _mapped(inner, support, counts[0]), _mapped(upper, query, counts[1])
            )

    @attempted
    def step(
        self, outer: Params, state: SABAState, episode: Any
    ) -> tuple[Params, SABAState, StepAux]:
        """Return the outer gradient, the next state and aux, all detached.

        Args:
            outer: the outer parameters.
            state: of `init` or of the step before.
            episode: `Episode(Term, Term)`, of `draw` or of a sampler of your own.

        Raises:
            ProblemError: if the episode does not say which terms it holds.
            NonFiniteError: outside transforms, if the inner gradient is NaN or infinite.
        """
        support, query = as_episode(episode)
        if not isinstance(support, Term) or not isinstance(query, Term):
            raise ProblemError(
                f"SABA needs numbered terms: Episode(Term(i, data), Term(j, data)), got "
                f"{type(support).__name__} and {type(query).__name__}. Draw them by "
                "mf.algorithms.draw(data, generator=...)."
            )
        outer, (fast, v, inner, upper) = constants(outer), pt.detach(state)
        data = Episode(support.data, query.data)
        with torch.no_grad():
            loss, fresh = self._outer(fast, outer, data)
            inner_now, inner = _reduced(self._inner(fast, v, outer, data), inner, support.number)
            outer_now, upper = _reduced(fresh, upper, query.number)
            slope = pt.add(inner_now.curvature, outer_now.fast)
            aux = StepAux(loss, pt.norm(inner_now.gradient), pt.norm(slope))
            check_stationarity(aux.stationarity)
            after = SABAState(
                pt.add(fast, inner_now.gradient, -self.inner_lr),
                pt.add(v, slope, -self.v_lr),
                inner,
                upper,
            )
            return pt.add(outer_now.outer, inner_now.mixed), after, aux

    def _inner(self, fast: Params, v: Params, outer: Params, episode: Episode) -> InnerTerms:
        inner, _ = levels(self.problem, episode)
        gradient, product = self.hvp(inner, fast, outer)
        curvature, mixed = product(v)
        return InnerTerms(gradient, curvature, free(outer, mixed))

    def _outer(self, fast: Params, outer: Params, episode: Episode) -> tuple[Tensor, OuterTerms]:
        _, upper = levels(self.problem, episode)
        loss, by_fast, by_outer = gradients(upper, fast, outer)
        return loss, OuterTerms(by_fast, by_outer)


def _mapped(function: Any, data: Any, count: int) -> Any:
    """Return `function` of every term, stacked; a loop, so that no term needs to be vmappable."""
    results = [function(select(data, i)) for i in range(count)]
    columns = zip(*(pt.tensors(r) for r in results), strict=True)
    _, together = pt.partition(results[0])
    return together([torch.stack(column) for column in columns])


def _reduced(fresh: Any, memory: Any, index: Tensor) -> tuple[Any, Any]:
    """Return the variance-reduced estimate and the memory with `fresh` at `index`."""
    new, rebuild = pt.partition(fresh)
    estimates, tables = [], []
    at = index.reshape(1)
    for x, table in zip(new, pt.tensors(memory), strict=True):
        place = at.to(table.device)
        estimates.append(x - table.index_select(0, place).squeeze(0) + table.mean(0))
        tables.append(table.index_copy(0, place, x.unsqueeze(0)))
    return rebuild(estimates), rebuild(tables)
