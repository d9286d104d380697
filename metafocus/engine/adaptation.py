"""The inner loop alone, for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metafocus import params as pt
from metafocus.calls import attempted
from metafocus.checks import check_finite, is_whole
from metafocus.engine.checked_parts import check_problem, check_solver
from metafocus.errors import ProblemError
from metafocus.preflight import preflight
from metafocus.problem import Problem, check_params, constants
from metafocus.sharding import local_parts
from metafocus.solvers.descent import solve_inner
from metafocus.torch_internals import transforming
from metafocus.types import Episode, Params, Solution, Solver


@attempted
def adapt(
    problem: Problem, outer: Params, support: Any, *, solver: Solver, path: Sequence[int] = ()
) -> Solution:
    """Run the inner loop for evaluation: adapted fast weights without any outer graph.

    Args:
        problem: the bilevel problem; its outer loss is not used.
        outer: the outer parameters.
        support: what the inner loss sees, or a stream of it.
        solver: the inner optimiser.
        path: numbers of the inner steps, from 0, after which the fast weights are wanted too, in
            `Solution.path`.

    Raises:
        ProblemError: as `bilevel` does.
        NonFiniteError: if an inner loss is NaN or infinite (always checked outside `vmap`).

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> maml = mf.Problem(loss, loss)
        >>> w = {"w": torch.tensor([1.0])}
        >>> mf.adapt(maml, w, torch.tensor([0.0]), solver=mf.SGD(0.1, steps=2)).losses
        tensor([1.0000, 0.6400])
    """
    check_problem(problem)
    check_solver(solver)
    check_params(outer, "outer", "outer parameters")
    if not isinstance(path, list | tuple | range) or not all(map(is_whole, path)):
        raise ProblemError(
            f"path must be a list of numbers of inner steps, such as [0, 2], got {path!r}."
        )
    if isinstance(support, Episode):
        raise ProblemError(
            "support must be the data of the inner loss, got an mf.Episode: pass episode.support."
        )
    outer = constants(local_parts(outer))
    support = pt.detach(problem.prepared(outer, Episode(support, support)).support)
    start, inner_loss = problem.start(outer, support), problem.inner_loss
    if not transforming():
        inner_loss = preflight(inner_loss, solver, start, outer, support)
    solution = solve_inner(inner_loss, solver, start, outer, support, path)
    if not transforming():
        check_finite(solution.losses)
    return solution
