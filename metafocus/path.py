"""The path of an inner loop: the outer loss after each step, and the weight of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from metafocus.errors import ProblemError
from metafocus.problem import Problem
from metafocus.solvers import Given
from metafocus.types import Params, Solver

Path = Tensor | Sequence[float] | Callable[[Params], Tensor | Sequence[float]]
"""Weights of the outer loss after each inner step: `[steps]`, or a function of the outer ones."""


def weighted(
    problem: Problem, ends: Iterable[tuple[Any, Params, Any]], outer: Params
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of weighted outer losses, and the metrics of the last one.

    Args:
        problem: whose outer loss.
        ends: weight (None: one), fast weights and query of each term.
        outer: the outer parameters.
    """
    total, metrics = None, {}
    for weight, fast, query in ends:
        value, metrics = problem.evaluate(fast, outer, query)
        value = value if weight is None else value * weight
        total = value if total is None else total + value
    assert total is not None
    return total, metrics


def path_weights(path: Path, outer: Params, steps: int) -> Sequence[Any]:
    """Return one weight for each inner step.

    Raises:
        ProblemError: if there is another number of them, or no step to weigh.
    """
    weights = path(outer) if callable(path) else path
    shape = list(weights.shape) if isinstance(weights, Tensor) else None
    if shape is None and hasattr(weights, "__len__"):
        shape = [len(weights)]
    if shape != [steps] or not steps:
        got = type(weights).__name__ if shape is None else f"shape {shape}"
        raise ProblemError(
            f"path must give one weight for each of the {steps} inner steps, got {got}."
        )
    return weights.unbind() if isinstance(weights, Tensor) else weights


def refuse_path(estimator: Any, solver: Solver) -> None:
    """Raise if there are no inner steps, or the estimator returns the last iterate only."""
    if isinstance(solver, Given):
        raise ProblemError(f"path= needs inner steps, and {solver} has none. Use mf.SGD.")
    try:
        inspect.signature(estimator).bind(*[None] * 5, path=())
    except TypeError as error:
        raise ProblemError(
            f"path= needs the fast weights after every step, and {name_of(estimator)} gives the "
            "last ones only: it takes no keyword path. Use Unrolled, FirstOrder or EvoGrad."
        ) from error


def name_of(estimator: Any) -> str:
    """Return the name of an estimator for a message: a function's, or the object as it prints."""
    return getattr(estimator, "__name__", str(estimator))
