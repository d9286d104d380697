"""One estimator on one problem, run under observation."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.comparison.agreement import Agreement, agreement, is_finite
from metafocus.comparison.counting import Tally
from metafocus.comparison.memory import peak_bytes, peak_rss
from metafocus.engine import MetaLoss, adapt, bilevel, hypergrad
from metafocus.errors import NonFiniteError
from metafocus.estimators import FixedPoint
from metafocus.estimators.attached import Point, gradient_norm
from metafocus.problem import Problem, constants
from metafocus.rng import kept
from metafocus.types import Episode, Params, Solver


@dataclass
class Report:
    """What the runs of one estimator showed; None where a quantity does not apply.

    Attributes:
        agreement: with the reference; None if a loss or a hypergradient was not finite.
        peak: bytes.
        gradients: evaluations of the inner loss.
        products: products with its second derivatives.
        linear_residual: of the estimator's linear system.
        residual: how stationary the inner solution is.
        implicit: whether the estimator needs a stationary solution.
    """

    agreement: Agreement | None = None
    peak: int | None = None
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
        # A user's estimator need not be a dataclass, and this is no setting to be checked.
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


def observe(
    report: Report,
    meta_loss: MetaLoss,
    outer: Params,
    episode: Episode,
    exact: Params,
    *,
    seeds: int = 1,
    fresh_process: bool = False,
) -> Report:
    """Run any meta loss for its hypergradients and its memory; complete the report."""
    gradient = hypergrad(meta_loss)

    def draws() -> Iterator[Params]:
        for seed in range(seeds):
            torch.manual_seed(seed)
            found = gradient(outer, episode)[0]
            if not is_finite(found):
                raise NonFiniteError("the hypergradient is not finite.")
            yield found

    def run() -> Any:
        return gradient(outer, episode)

    with kept(pt.tensors((outer, episode))):
        try:
            report.agreement = agreement(draws(), exact)
            device = next(iter(outer.values())).device
            report.peak = peak_rss(run) if fresh_process else peak_bytes(run, device)[1]
        except NonFiniteError:
            return report
    return report


def first_draw(meta_loss: MetaLoss, outer: Params, episode: Episode) -> Params | None:
    """Return the hypergradient under seed 0; None if an inner loss is not finite."""
    with kept(pt.tensors((outer, episode))):
        torch.manual_seed(0)
        try:
            return hypergrad(meta_loss)(outer, episode)[0]
        except NonFiniteError:
            return None


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
