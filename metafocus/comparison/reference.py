"""What the contenders are compared with: an estimator, central differences, or any gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from metafocus import params as pt
from metafocus.checks import takes
from metafocus.comparison.contenders import Gradient, of_estimator, of_other, seeded_again
from metafocus.engine import MetaLoss, bilevel
from metafocus.errors import ProblemError
from metafocus.estimators import FirstOrder
from metafocus.problem import Problem, moving
from metafocus.rng import Drawn
from metafocus.tasks import over_tasks
from metafocus.types import Params, Solver

DIFFERENCES = "central differences"
MOST = 10_000
"""The largest number of outer parameters for central differences: each takes two inner loops."""


def title(
    reference: Any, estimators: Mapping[str, Any], others: Mapping[str, Any], outer: Params
) -> str:
    """Return what to call a reference.

    Raises:
        ProblemError: if it is no reference.
    """
    if isinstance(reference, str):
        names = [*estimators, *others]
        if reference not in names and reference != DIFFERENCES:
            raise ProblemError(
                f"reference {reference!r} is not one of the estimators {sorted(names)}, nor "
                f"{DIFFERENCES!r}."
            )
        if reference == DIFFERENCES:
            _check_size(outer)
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
) -> Gradient:
    """Return the reference hypergradient as a function of outer parameters and episode.

    Args:
        reference: as `compare` takes it.
        problem: the problem.
        solver: the inner optimiser of the setting.
        parts: the estimators and the others, by name.
        tasks: whether the episode holds several.
        seed: for generators of the reference.
    """
    estimators, others = parts
    if isinstance(reference, dict):
        given = pt.detach(reference)
        return lambda outer, episode: given
    if reference == DIFFERENCES:
        meta = bilevel(problem, solver=solver, estimator=FirstOrder())
        return _differences(over_tasks(meta, aux="losses") if tasks else meta)
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


def _differences(meta_loss: MetaLoss) -> Gradient:
    """Return central differences of a meta loss, with the same random numbers at every point."""

    def run(outer: Params, episode: Any) -> Params:
        _check_size(outer)
        drawn = Drawn(pt.tensors((outer, episode)))
        found = {k: v.new_zeros(v.shape) for k, v in outer.items()}

        def value(at: Params) -> float:
            with drawn.again(), torch.no_grad():
                return float(meta_loss(at, episode)[0])

        for k, v in moving(outer).items():
            # The cube root of the rounding unit balances rounding and the third derivative.
            step = torch.finfo(v.dtype).eps ** (1 / 3) * (1 + v.abs())
            for i in range(v.numel()):
                ends = []
                for sign in (1.0, -1.0):
                    moved = v.detach().clone(memory_format=torch.contiguous_format)
                    moved.view(-1)[i] += sign * step.reshape(-1)[i]
                    ends.append((value({**outer, k: moved}), moved.view(-1)[i]))
                (up, high), (down, low) = ends
                found[k].view(-1)[i] = (up - down) / (high - low)
        return found

    return run


def _check_size(outer: Params) -> None:
    total = sum(v.numel() for v in outer.values())
    if total > MOST:
        raise ProblemError(
            f"reference={DIFFERENCES!r} takes two inner loops for each of the {total:,} outer "
            f"parameters; it is offered up to {MOST:,}. Use an estimator such as mf.Unrolled(), "
            "and mf.smoothness to check it along a few directions."
        )
