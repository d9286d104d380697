"""One evaluation of a meta loss: start, estimator, outer loss; the checks of the first one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.autodiff.grad import reaches_another_leaf
from metafocus.autodiff.safe_operators.swapping import Swapped
from metafocus.calls import noting
from metafocus.checks import check_finite
from metafocus.engine.checked_parts import check_solution
from metafocus.errors import ProblemError
from metafocus.estimators import Estimator
from metafocus.path import Path, name_of, path_weights, weighted
from metafocus.preflight import explained, preflight, try_outer_loss
from metafocus.preflight.arguments import unused_by
from metafocus.preflight.described import note_parts
from metafocus.preflight.own_gradients import on_tape_only
from metafocus.preflight.rebuilt import Uses
from metafocus.problem import Problem, check_params, refuse_empty
from metafocus.rng import kept
from metafocus.sharding import local_parts, refuse_bare_ddp, refuse_mixed, refuse_parts
from metafocus.torch_internals import innermost, is_tracked, outside_transforms, transforming
from metafocus.types import Aux, InnerLoss, Params, Solution, Solver

End = tuple[Any, Params, Any]
"""A term of the outer loss: its weight (None: one), the fast weights and the query."""


class Evaluation:
    """`(outer, episode) -> (loss, Aux)`, and what earlier evaluations have found.

    Args:
        problem: the losses of both levels and the start.
        solver: the inner optimiser.
        estimator: how the adapted fast weights depend on the outer parameters.
        path: weights of the outer loss after each inner step, as for `mf.bilevel`.
    """

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        estimator: Estimator | Callable[..., Solution],
        path: Path | None,
    ):
        self.problem = problem
        self.solver = solver
        self.estimator: Any = estimator
        self.path = path
        self.explicit: bool = getattr(estimator, "explicit", False)
        self.twice: bool = getattr(estimator, "twice", True)
        self.uses: Uses = Uses(
            problem.inner_loss, problem.outer_loss, problem.init, solver, estimator
        )
        self.inner_loss: InnerLoss | None = None
        self.outer_tried: bool = False
        self.outer_needs_swaps: bool = True
        self.weighted: Callable[..., tuple[Tensor, dict[str, Tensor]]] = weighted

    def __call__(self, outer: Params, episode: Any) -> tuple[Tensor, Aux]:
        """Evaluate the outer loss after adaptation."""
        problem, compiling = self.problem, torch.compiler.is_compiling()
        check_params(outer, "outer", "outer parameters")
        if self.explicit:
            refuse_empty(outer, self.estimator, "or use Unrolled() or FirstOrder()")
        given, outer = outer, local_parts(outer)
        support, query = problem.prepared(outer, episode)
        start = problem.start(outer, support)
        refuse_parts(start, given)
        explaining = noting()
        if explaining:
            note_parts(self.solver, self.estimator, self.path, start, outer, support, query)
        inner_loss = self.inner_loss or problem.inner_loss
        first = (self.inner_loss is None or explaining) and not compiling
        if first:
            if torch.is_grad_enabled():
                refuse_bare_ddp(given)
                self._refuse_cut_off_copies(start, outer, support, query)
            inner_loss = preflight(
                problem.inner_loss,
                self.solver,
                start,
                outer,
                support,
                explicit=self.explicit,
                twice=self.twice,
            )
        solution, ends = self._adapted(inner_loss, start, outer, support, query)
        if not transforming():
            check_finite(solution.losses)
        if first:
            self.inner_loss = inner_loss
        # Under no_grad an outer loss may be a metric without a derivative.
        if not self.outer_tried and torch.is_grad_enabled() and not compiling:
            self._try_outer(ends[-1], outer)
            self.outer_tried = True
        if self.uses.count < 2 and not compiling:
            self.uses.add()
        loss, metrics = self._outer_loss(ends, outer)
        tied = any(x.requires_grad for x in start.values())
        if first and not tied and torch.is_grad_enabled() and not transforming():
            self._refuse_nothing_flows(loss, given)
        return loss, Aux(pt.detach(solution.params), solution.losses.detach(), metrics)

    def _adapted(
        self, inner_loss: InnerLoss, start: Params, outer: Params, support: Any, query: Any
    ) -> tuple[Solution, list[End]]:
        """Return the solution, and what the outer loss is evaluated at."""
        args, steps = (inner_loss, self.solver, start, outer, support), self.solver.steps
        if self.path is None:
            try:
                solution = self.estimator(*args)
            except (AttributeError, RuntimeError) as error:
                refuse_mixed(name_of(self.estimator), start, error)
                raise
            check_solution(solution, start, self.estimator)
            return solution, [(None, solution.params, streams.at(query, max(steps - 1, 0)))]
        weights = path_weights(self.path, outer, steps)
        solution = self.estimator(*args, path=tuple(range(steps)))
        check_solution(solution, start, self.estimator)
        data = [streams.at(query, step) for step in range(steps)]
        if len(solution.path) != steps:
            raise ProblemError(
                f"{name_of(self.estimator)} was asked for the fast weights after {steps} steps "
                f"and returned a path of {len(solution.path)}."
            )
        return solution, list(zip(weights, solution.path, data, strict=True))

    def _try_outer(self, end: End, outer: Params) -> None:
        _, fast, query = end
        with explained("outer_loss", fast, query, "query"):
            if try_outer_loss(lambda *at: self.problem.evaluate(*at)[0], fast, outer, query):
                self.weighted = on_tape_only("outer_loss", weighted)

    def _refuse_cut_off_copies(
        self, start: Params, outer: Params, support: Any, query: Any
    ) -> None:
        """Raise if `init` detached the slow weights, and no loss reads them otherwise."""
        seen = [*start.values(), *pt.tensors((support, query))]
        if start.keys() != outer.keys() or any(map(is_tracked, seen)):
            return
        with outside_transforms():
            copied = all(_equal(v, outer[k]) for k, v in start.items())
        if not start or not copied or not all(map(is_tracked, outer.values())):
            return
        fast, constants = pt.detach(start), pt.detach(outer)
        last = max(self.solver.steps - 1, 0)
        with kept(pt.tensors((start, support, query))):
            for loss in (
                lambda o: self.problem.inner_loss(fast, o, streams.at(support, 0)),
                lambda o: self.problem.evaluate(fast, o, streams.at(query, last))[0],
            ):
                if unused_by(loss, constants) != outer.keys():
                    return
        raise ProblemError(
            "init detaches the slow weights and no loss reads them: the outer loss depends on "
            "nothing in outer, so loss.backward() would train nothing. Do not detach the slow "
            "weights in init (write v.clone(), not v.detach().clone()), or leave init out."
        )

    def _refuse_nothing_flows(self, loss: Tensor, outer: Params) -> None:
        """Raise if parameters of the user's require grad and the loss depends on none."""
        waiting = any(
            x.is_leaf and x.requires_grad and not hasattr(x, "engine_leaf") for x in outer.values()
        )
        # Torch itself refuses the backward pass of a loss without any graph.
        if waiting and loss.requires_grad and not reaches_another_leaf(loss):
            raise ProblemError(
                f"the outer loss after {name_of(self.estimator)} depends on nothing in outer, so "
                "loss.backward() would train nothing. Do not detach the slow weights in init "
                "(write v.clone(), not v.detach().clone()), or evaluate under torch.no_grad()."
            )

    def _outer_loss(self, ends: list[End], outer: Params) -> tuple[Tensor, dict[str, Tensor]]:
        # A mode costs at every operator: outside transforms only a loss that needs it has one.
        if not self.outer_needs_swaps and not transforming():
            return self.weighted(self.problem, ends, outer)
        with Swapped(once=True) as swapped:
            found = self.weighted(self.problem, ends, outer)
        if not transforming():
            self.outer_needs_swaps = swapped.needed
        return found


def _equal(a: Tensor, b: Tensor) -> bool:
    a, b = innermost(a), innermost(b)
    return a.shape == b.shape and bool(torch.equal(a, b))
