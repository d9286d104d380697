"""One estimator on one problem, run under observation."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.comparison.agreement import is_finite
from metafocus.comparison.contenders import Gradient
from metafocus.comparison.counting import Tally
from metafocus.comparison.differences import Exact
from metafocus.comparison.memory import peak_bytes, peak_rss
from metafocus.engine import adapt, bilevel, hypergrad
from metafocus.errors import NonFiniteError
from metafocus.estimators import FixedPoint
from metafocus.estimators.attached import Point, gradient_norm
from metafocus.problem import Problem, constants
from metafocus.types import Episode, Params, Solver


@dataclass(frozen=True)
class Report:
    """What one run of an estimator under observation showed; None where it does not apply.

    Attributes:
        gradients: evaluations of the inner loss.
        products: products with its second derivatives.
        linear_residual: of the estimator's linear system.
        residual: how stationary the inner solution is.
        implicit: whether the estimator needs a stationary solution.
    """

    gradients: int | None = None
    products: int | None = None
    linear_residual: float | None = None
    residual: float | None = None
    implicit: bool = False


def examine(
    problem: Problem, outer: Params, episode: Episode, solver: Solver, estimator: Any
) -> Report:
    """Run an estimator once for its counts and the residuals of its systems."""
    tally = Tally()
    implicit = hasattr(estimator, "solve")
    watched = copy.copy(estimator)
    if implicit:
        # A user's estimator need not be a dataclass, and its checks do not apply to this.
        object.__setattr__(watched, "solve", tally.watching(estimator.solve))
    counted = bilevel(tally.counting(problem), solver=solver, estimator=watched)
    residual = inner_residual(problem, outer, episode, solver, estimator)
    try:
        with torch.no_grad():
            counted(outer, episode)
        # The first call evaluates the inner loss once more, to check the problem.
        tally.reset()
        hypergrad(counted)(outer, episode)
    except NonFiniteError:
        return Report(gradients=tally.losses, residual=residual, implicit=implicit)
    products = tally.products
    if isinstance(estimator, FixedPoint):
        # Products with the Jacobian of the step: the linear solver's, and the mixed one.
        products = tally.solves + 1
    return Report(
        gradients=tally.losses,
        products=products,
        linear_residual=tally.residual,
        residual=residual,
        implicit=implicit,
    )


def drawn(gradient: Gradient, outer: Params, episode: Any, seed: int) -> Params | None:
    """Return the hypergradient under a torch seed; None if it or an inner loss is not finite."""
    found = drawn_exact(lambda *point: Exact(gradient(*point)), outer, episode, seed)
    return found and found.grads


def drawn_exact(
    exact: Callable[[Params, Any], Exact], outer: Params, episode: Any, seed: int
) -> Exact | None:
    """Return what a reference finds under a torch seed, as `drawn` does."""
    torch.manual_seed(seed)
    try:
        found = exact(outer, episode)
    except NonFiniteError:
        return None
    return found if is_finite(found.grads) else None


def peak(gradient: Gradient, outer: Params, episode: Any, fresh_process: bool) -> int | None:
    """Return the peak memory of one hypergradient, in bytes; None if it cannot be watched."""

    def run() -> Any:
        return gradient(outer, episode)

    device = next(iter(outer.values())).device
    if fresh_process:
        return peak_rss(run)
    if device.type == "cpu" and not getattr(gradient, "watched", True):
        return None
    return peak_bytes(run, device)[1]


def inner_residual(
    problem: Problem, outer: Params, episode: Episode, solver: Solver, estimator: Any = None
) -> float:
    """Return how stationary the inner solution is, over how stationary the start is.

    For `FixedPoint` the norm of `step(fast) - fast`, else that of the inner gradient; NaN if an
    inner loss is not finite.
    """
    try:
        solution = adapt(problem, outer, episode.support, solver=solver)
    except NonFiniteError:
        return math.nan
    outer = constants(outer)
    support = pt.detach(problem.prepared(outer, episode).support)
    start = pt.detach(problem.start(outer, support))
    view = getattr(estimator, "data", None)
    data = view(support) if callable(view) else streams.at(support, max(solver.steps - 1, 0))

    def residual(fast: Params) -> Tensor:
        if isinstance(estimator, FixedPoint):
            with torch.enable_grad():
                moved = estimator.step(fast, outer, data)
            return pt.norm(pt.sub(pt.detach(moved), fast))
        return gradient_norm(problem.inner_loss, Point(fast, outer, data))

    before, after = (residual(fast) for fast in (start, solution.params))
    return float(after / before)


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds that a call takes, with what it left running on the device."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
