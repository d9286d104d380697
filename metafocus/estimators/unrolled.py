"""Differentiate through the inner steps: all, the last few, or none of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.autodiff.grad import pullback
from metafocus.autodiff.hvp import check_hvp, evaluated_for, hvp_reverse
from metafocus.autodiff.purity import watched
from metafocus.autodiff.recompute import recompute
from metafocus.autodiff.stores import Store
from metafocus.autodiff.tied import tied_to
from metafocus.checks import whole
from metafocus.errors import ProblemError
from metafocus.estimators.segments import best_size, cut
from metafocus.estimators.stored import StoredLoop, refuse_transforms
from metafocus.solvers import Given
from metafocus.solvers.descent import (
    count,
    descend,
    picked,
    refuse_own_rule,
    segment,
    solve_inner,
    stacked,
)
from metafocus.types import HVP, Estimator, InnerLoss, Params, Solution, Solver, State


@dataclass(frozen=True)
class FirstOrder(Estimator):
    """The adapted fast weights move with the start only: the adaptation is a constant shift.

    `d outer_loss / d outer = direct + v' d start / d outer`, with `v` the derivative of the outer
    loss by the fast weights. First-order MAML (arXiv 1703.03400, section 5.2) and the official
    FocuSFT. With a `path`, every iterate is tied to the start in this way.

    Raises:
        ProblemError: at the call, for `mf.Given`: its solution does not depend on the start.

    Example:
        >>> FirstOrder()
        FirstOrder()
    """

    def __call__(
        self,
        inner_loss: InnerLoss,
        solver: Solver,
        start: Params,
        outer: Params,
        support: Any,
        *,
        path: tuple[int, ...] = (),
    ) -> Solution:
        """Run the inner loop without a graph; tie what it reaches to the start."""
        if isinstance(solver, Given):
            raise solver.without_steps()
        found = solve_inner(inner_loss, solver, start, outer, support, path)
        tied = tuple(tied_to(start, fast) for fast in found.path)
        return Solution(tied_to(start, found.params), found.losses, tied)


@dataclass(frozen=True)
class Unrolled(Estimator):
    """Differentiate through the inner loop, as if it were any other code.

    `d fast_K / d outer = sum_t (prod_(s>t) d fast_(s+1) / d fast_s) d fast_(t+1) / d outer`.

    With `last=k` only the last `k` steps are differentiated; the steps before are constant, and
    the fast weights after them are tied straight-through to the start: with the default `init`,
    `last=0` is first-order MAML. (Truncated back-propagation: Shaban et al., arXiv 1810.10667.)

    Args:
        last: how many steps to differentiate, from the end; None: all.
        recompute: False keeps the graph of all steps. True or `k` runs the inner loop without a
            graph and rebuilds it in the backward pass, one step or `k` steps at a time: the
            memory of one segment's graph, plus the fast weights and the solver state of each
            segment, which grow with the steps unless a `store` bounds them (under `backward` and
            `hypergrad`; `torch.func.grad` records its own backward pass), for 1.2 to 1.5 times
            the time. Of segments of `k > 1` the last keeps its graph, as it is needed first; if
            `k` does not divide the steps, the first is the shorter one. `"auto"` takes the `k` of
            least memory, by the sizes of a state and of a step's graph, which one more step
            measures at each call (inside transforms: 1). Same gradient. A stream is asked again
            for the data of a rebuilt step.
        hvp: how to multiply with second derivatives: `hvp_reverse` (exact), `hvp_forward`
            (exact, MixFlow-MG, arXiv 2505.00793) or `hvp_finite(eps)`, which needs first
            derivatives only. The last two rebuild step by step.
        store: where the states of a rebuilt loop live (`mf.stores.cpu()`, `.disk(directory)`), or
            which of them are kept (`.segments(k)`, `.schedule(slots)`, `.tree(k)`); steps are
            rebuilt one at a time. Same gradient, to the last bit of a state. `store.cost(steps)`
            says how many states are kept and how many steps are taken again. For `backward` and
            `hypergrad`, first derivatives, outside transforms.

    Raises:
        ValueError: for a negative `last` or `recompute`; for a `store` together with another
            `hvp` or with segments of `recompute=k`.
        ProblemError: at the call, for `hvp_forward` or `hvp_finite` with a solver that has a
            `direction` of its own, and if a stream gives other data to a rebuilt step.

    Example:
        >>> Unrolled(last=3, recompute=True)
        Unrolled(last=3, recompute=True, hvp=hvp_reverse)
    """

    last: int | None = None
    recompute: bool | int | str = False
    hvp: HVP = hvp_reverse
    store: Store | None = None

    def __post_init__(self) -> None:
        if self.last is not None:
            whole("last", self.last)
        if not isinstance(self.recompute, bool) and self.recompute != "auto":
            whole("recompute", self.recompute, note=', True, False or "auto"')
        check_hvp(self.hvp)
        if self.store is not None:
            self._check_store()

    def _check_store(self) -> None:
        if not isinstance(self.store, Store):
            raise ProblemError(
                "store must be one of mf.stores, such as mf.stores.schedule(12), got "
                f"{self.store!r}."
            )
        if self.hvp is not hvp_reverse:
            raise ProblemError(
                f"Unrolled(store=...) rebuilds steps with hvp_reverse only, got hvp={self._hvp}. "
                "Leave hvp out, or use recompute=True in place of store."
            )
        if not isinstance(self.recompute, bool) and self.recompute:
            raise ProblemError(
                "Unrolled(store=...) rebuilds single steps, got "
                f"recompute={self.recompute!r} beside it. Leave recompute out; "
                "mf.stores.segments(k) keeps the states of segments."
            )

    @property
    def _hvp(self) -> Any:
        return getattr(self.hvp, "__name__", self.hvp)

    def __repr__(self) -> str:
        store = "" if self.store is None else f", store={self.store}"
        return f"Unrolled(last={self.last}, recompute={self.recompute}, hvp={self._hvp}{store})"

    @property
    def explicit(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether derivatives flow through explicit tensors only."""
        rebuilt = bool(self.recompute) or self.hvp is not hvp_reverse or self.store is not None
        return self.last != 0 and rebuilt

    @property
    def twice(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the gradient of the inner loss is differentiated."""
        return self.last != 0 and not getattr(self.hvp, "first_order", False)

    def __call__(
        self,
        inner_loss: InnerLoss,
        solver: Solver,
        start: Params,
        outer: Params,
        support: Any,
        *,
        path: tuple[int, ...] = (),
    ) -> Solution:
        """Run the inner loop."""
        if self.store is not None:
            refuse_transforms()
        steps = count(solver, start)
        head = 0 if self.last is None else max(steps - self.last, 0)
        params, state, losses, kept = start, solver.init(start), [], []
        if head:
            params, state, losses, kept = descend(
                inner_loss,
                solver,
                pt.detach(start),
                pt.detach(state),
                pt.detach(outer),
                pt.detach(support),
                range(head),
                differentiable=False,
                path=path,
            )
            params, kept = tied_to(start, params), [tied_to(start, fast) for fast in kept]
        if head < steps:
            loss = evaluated_for(self.hvp, inner_loss)
            tail = self._rebuilt if self.explicit else segment
            if self.store is not None:
                tail = functools.partial(StoredLoop, store=self.store)
            run = tail(loss, solver, range(head, steps), path)
            params, state, more, later = run(params, state, outer, support)
            losses, kept = losses + more, kept + later
        return Solution(params, stacked(losses, params), picked(kept, path, steps))

    def _rebuilt(
        self, loss: InnerLoss, solver: Solver, steps: range, path: tuple[int, ...]
    ) -> Callable[..., Any]:
        """Return what `segment` returns, but rebuilt in the backward pass."""
        exact = self.hvp is hvp_reverse
        if not exact:
            refuse_own_rule(f"Unrolled with hvp={self._hvp}", solver)

        def run(params: Params, state: State, outer: Params, support: Any) -> Any:
            losses: list[Tensor] = []
            kept: list[Params] = []
            support = watched(support)
            size = int(self.recompute) if exact and self.recompute != "auto" else 1
            if exact and self.recompute == "auto":
                size = best_size(loss, solver, steps, params, state, outer, support)
            for part in cut(steps, size):
                # The fast weights after the last step are the result already.
                inside = [step for step in path if step in part[:-1]]
                forward = segment(loss, solver, part, inside)
                args = (params, state, outer, streams.part(support, part))
                if size > 1 and part.stop == steps.stop:
                    # The backward pass begins here: it would rebuild this graph before any other.
                    params, state, more, later = forward(*args)
                else:
                    pull = None if exact else _step_pullback(loss, solver, part.start, self.hvp)
                    params, state, more, later = recompute(forward, *args, pullback=pull)
                losses += more
                kept += [*later, params] if part[-1] in path else later
            return params, state, losses, kept

        return run


def _step_pullback(loss: InnerLoss, solver: Solver, step: int, hvp: HVP) -> Callable[..., Any]:
    """Return the pullback of one inner step with the second derivatives left to `hvp`.

    The step is `update(params, grad(params, outer, support), state, outer)`. Its pullback is that
    of `update`, which is cheap, plus the Hessian and mixed products along the cotangent of `grad`.
    """

    def run(args: tuple[Any, ...], cotangents: Any) -> tuple[Any, ...]:
        params, state, outer, support = args
        floats, rebuild = pt.partition(support, pt.is_differentiable)

        def explicit(p: Params, o: Params, s: list[Tensor]) -> Tensor:
            return loss(p, o, streams.at(rebuild(s), step))

        grads, product = hvp(explicit, params, outer, floats)
        inputs, together = pt.partition((params, grads, state, outer))

        def update(*xs: Tensor) -> list[Any]:
            p, g, s, o = together(xs)
            return pt.leaves(solver.update(p, g, s, step, o))

        pulled = pullback(update, inputs, pt.leaves(cotangents[:2]), [True] * len(inputs))
        filled = [
            torch.zeros_like(x) if g is None else g for g, x in zip(pulled, inputs, strict=True)
        ]
        d_params, d_grads, d_state, d_outer = together(filled)
        h_params, m_outer, m_floats = product(d_grads)
        return (
            pt.add(d_params, h_params),
            d_state,
            pt.add(d_outer, m_outer),
            rebuild(m_floats),
        )

    return run
