"""What the contenders are compared with: an estimator, central differences, or any gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metafocus import params as pt
from metafocus.checks import takes
from metafocus.comparison.contenders import Gradient, of_estimator, of_other, seeded_again
from metafocus.comparison.differences import DIFFERENCES, Exact, check_size, differences
from metafocus.engine import bilevel
from metafocus.errors import ProblemError
from metafocus.estimators import FirstOrder
from metafocus.problem import Problem
from metafocus.tasks import over_tasks
from metafocus.types import Params, Solver


def title(
    reference: Any, estimators: Mapping[str, Any], others: Mapping[str, Any], outer: Params
) -> str:
    """Return what to call a reference.

    Raises:
        ProblemError: if it is not a reference.
    """
    if isinstance(reference, str):
        names = [*estimators, *others]
        if reference not in names and reference != DIFFERENCES:
            raise ProblemError(
                f"reference {reference!r} is not one of the estimators {sorted(names)}, nor "
                f"{DIFFERENCES!r}."
            )
        if reference == DIFFERENCES:
            check_size(outer)
        return reference
    if isinstance(reference, dict):
        shapes, expected = pt.shapes(reference), pt.shapes(outer)
        if shapes != expected:
            raise ProblemError(
                f"the reference hypergradient has the shapes {shapes}, outer has {expected}."
            )
        return "the given hypergradient"
    if _is_gradient(reference):
        return getattr(reference, "__name__", None) or "the given function"
    return str(reference)


def exact(
    reference: Any,
    problem: Problem,
    solver: Solver,
    parts: tuple[Mapping[str, Any], Mapping[str, Any]],
    tasks: bool,
    seed: int,
) -> Callable[[Params, Any], Exact]:
    """Return the reference hypergradient as a function of outer parameters and episode."""
    if isinstance(reference, str) and reference == DIFFERENCES:
        meta = bilevel(problem, solver=solver, estimator=FirstOrder())
        meta = over_tasks(meta, aux="losses") if tasks else meta
        return lambda outer, episode: differences(meta, outer, episode)
    gradient = _gradient(reference, problem, solver, parts, tasks, seed)
    return lambda outer, episode: Exact(gradient(outer, episode))


def _gradient(
    reference: Any,
    problem: Problem,
    solver: Solver,
    parts: tuple[Mapping[str, Any], Mapping[str, Any]],
    tasks: bool,
    seed: int,
) -> Gradient:
    estimators, others = parts
    if isinstance(reference, dict):
        given = pt.detach(reference)
        return lambda outer, episode: given
    if isinstance(reference, str):
        if reference in others:
            return of_other(reference, others[reference], solver, tasks, seed)
        reference = estimators[reference]
    if _is_gradient(reference):
        return _given(reference, solver)
    return of_estimator(problem, solver, seeded_again(reference, seed), tasks)


def _is_gradient(reference: Any) -> bool:
    """Whether it is a function of outer parameters and episode, and perhaps of the solver."""
    return callable(reference) and not takes(reference, 5)


def _given(function: Any, solver: Solver) -> Gradient:
    def run(outer: Params, episode: Any) -> Params:
        args = (outer, episode, solver) if takes(function, 3) else (outer, episode)
        found = function(*args)
        # What mf.hypergrad makes returns the loss, too.
        found = found[0] if isinstance(found, tuple) else found
        if not isinstance(found, dict) or pt.shapes(found) != pt.shapes(outer):
            got = pt.shapes(found) if isinstance(found, dict) else type(found).__name__
            raise ProblemError(
                f"the reference function must return a dict of the shapes {pt.shapes(outer)}, got "
                f"{got}."
            )
        return pt.detach(found)

    return run
