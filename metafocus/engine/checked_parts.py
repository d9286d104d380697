"""What a meta loss is made of, and what its estimator returns: checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafocus.checks import function
from metafocus.errors import ProblemError
from metafocus.path import name_of
from metafocus.problem import Problem
from metafocus.torch_internals import is_tracked
from metafocus.types import Params, Solution


def check_parts(problem: Any, solver: Any, estimator: Any) -> None:
    """Raise unless the three parts are what they should be."""
    check_problem(problem)
    check_solver(solver)
    check_estimator("estimator", estimator)


def check_problem(problem: Any) -> None:
    """Raise unless a problem is one."""
    if not isinstance(problem, Problem):
        raise ProblemError(
            f"problem must be an mf.Problem(inner_loss, outer_loss), got {type(problem).__name__}."
        )


def check_estimator(name: str, estimator: Any) -> None:
    """Raise unless an estimator can be called as one."""
    _refuse_class(name, estimator, "mf.Unrolled()")
    form = "(inner_loss, solver, start, outer, support) -> mf.Solution, such as mf.Unrolled()"
    function(name, estimator, form, 5)


def _refuse_class(name: str, part: Any, example: str) -> None:
    if isinstance(part, type):
        raise ProblemError(
            f"{name} must be an object, got the class {part.__name__}: write {example}."
        )


def check_solver(solver: Any) -> None:
    """Raise unless a solver has what the inner loop calls."""
    _refuse_class("solver", solver, "mf.SGD(0.1, steps=5)")
    if not all(hasattr(solver, name) for name in ("steps", "init", "update")):
        raise ProblemError(
            "solver must have steps, init and update, as mf.SGD(0.1, steps=5) has, got "
            f"{type(solver).__name__}. Optimisers of torch.optim work in place and cannot be "
            "differentiated; mf.SGD, mf.Adam, mf.AdamW, mf.Muon have their formulas."
        )


def check_solution(solution: Any, start: Params, estimator: Any) -> None:
    """Raise unless an estimator returned a solution with every fast weight."""
    if not isinstance(solution, Solution):
        raise ProblemError(
            f"{name_of(estimator)} must return mf.Solution(params, losses), got "
            f"{type(solution).__name__}."
        )
    if not isinstance(solution.params, dict) or solution.params.keys() != start.keys():
        got = sorted(solution.params) if isinstance(solution.params, dict) else solution.params
        raise ProblemError(
            f"{name_of(estimator)} must return every fast weight that the start holds, "
            f"{sorted(start)}, got {got}."
        )
    if not isinstance(solution.losses, Tensor):
        raise ProblemError(
            f"{name_of(estimator)} must return the inner losses of mf.Solution as a tensor, got "
            f"{type(solution.losses).__name__}: torch.stack(losses)."
        )
    if torch.is_grad_enabled():
        _refuse_constant(solution.params, start, estimator)


def _refuse_constant(params: Params, start: Params, estimator: Any) -> None:
    """Raise for fast weights without a graph where the start has one."""
    if any(map(is_tracked, start.values())) and not any(map(is_tracked, params.values())):
        raise ProblemError(
            f"{name_of(estimator)} returned constants: no derivative flows through its fast "
            "weights, and the hypergradient would be zero. mf.solve_inner returns constants; tie "
            "them to the start as mf.FirstOrder does, v + (start[k] - start[k].detach()), or "
            "combine estimators."
        )
