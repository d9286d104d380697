"""The inner loss before each step and after the last one, and whether that step can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from metafocus import params as pt
from metafocus import streams
from metafocus.engine import adapt
from metafocus.errors import NonFiniteError
from metafocus.problem import Problem, constants
from metafocus.types import Episode, Params, Solver


def inner_curve(problem: Problem, outer: Params, support: Any, solver: Solver) -> list[float]:
    """Return the inner loss before each step, and after the last one on the last step's data.

    It is empty if a loss is NaN or infinite.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> start, target = {"w": torch.ones(1)}, torch.zeros(1)
        >>> inner_curve(mf.Problem(loss, loss), start, target, mf.SGD(0.5, steps=1))
        [1.0, 0.0]
    """
    try:
        solution = adapt(problem, outer, support, solver=solver)
    except NonFiniteError:
        return []
    outer = constants(outer)
    prepared = pt.detach(problem.prepared(outer, Episode(support, support)).support)
    data = streams.at(prepared, max(solver.steps - 1, 0))
    with torch.no_grad():
        after = problem.inner_loss(pt.detach(solution.params), outer, data)
    return [*solution.losses.tolist(), float(after)]


def diverges(curve: Sequence[float]) -> bool:
    """Return whether the last inner step raised the inner loss.

    There a first-order hypergradient is often no longer one: see the page on the cosine study.

    Args:
        curve: the loss before each step, and after the last one.

    Example:
        >>> diverges([2.98, 1.10, 9.63]), diverges([2.98, 1.10, 0.96]), diverges([2.98])
        (True, False, False)
    """
    return len(curve) > 1 and not curve[-1] <= curve[-2]


def shown(curve: Sequence[float]) -> str:
    """Return the losses as a text, with a warning if the last step diverges.

    Example:
        >>> shown([2.98, 1.10, 0.96])
        'loss 2.9800, 1.1000, then 0.9600'
        >>> shown([1.10, 9.63])
        'loss 1.1000, then 9.6300: warning: the last step raised it, lower the inner learning rate'
    """
    *before, after = curve
    text = f"loss {', '.join(f'{x:.4f}' for x in before)}, then {after:.4f}"
    if diverges(curve):
        text += ": warning: the last step raised it, lower the inner learning rate"
    return text
