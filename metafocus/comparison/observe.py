"""One estimator on one problem, run under observation."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.comparison.memory import peak_bytes, peak_rss
from metafocus.engine import MetaLoss, adapt, bilevel, hypergrad
from metafocus.errors import NonFiniteError
from metafocus.estimators.attached import Point, gradient_norm
from metafocus.problem import Problem
from metafocus.rng import kept
from metafocus.types import Episode, MatVec, Params, Solver


@dataclass
class Report:
    """What the runs of one estimator showed; None where a quantity does not apply.

    Attributes:
        draws: one flat hypergradient for each seed, float64, as `[seeds, size]`; None if an inner
            loss was not finite.
        peak: bytes.
        gradients: evaluations of the inner loss.
        products: products with its second derivatives.
        linear_residual: of the estimator's linear system.
        implicit: whether it solves one.
    """

    draws: Tensor | None = None
    peak: int | None = None
    gradients: int | None = None
    products: int | None = None
    linear_residual: float | None = None
    implicit: bool = False


class _Tally:
    """Counts evaluations of the inner loss and products with the Hessian."""

    def __init__(self):
        self.losses = 0
        self.products = 0
        self.residual: float | None = None

    def counting(self, problem: Problem) -> Problem:
        def inner_loss(*args: Any) -> Tensor:
            self.losses += 1
            return problem.inner_loss(*args)

        return dataclasses.replace(problem, inner_loss=inner_loss)

    def watching(self, solve: Callable[[MatVec, Params], Params]) -> Any:
        def watched(matvec: MatVec, b: Params) -> Params:
            def counted(v: Params) -> Params:
                self.products += 1
                return matvec(v)

            x = solve(counted, b)
            self.residual = float(pt.norm(pt.sub(matvec(x), b)) / pt.norm(b))
            return x

        return watched


def examine(
    problem: Problem,
    outer: Params,
    episode: Episode,
    solver: Solver,
    estimator: Any,
    *,
    seeds: int = 1,
    fresh_process: bool = False,
) -> Report:
    """Run an estimator for its hypergradients, its memory and its counts."""
    tally = _Tally()
    implicit = hasattr(estimator, "solve")
    watched = (
        dataclasses.replace(estimator, solve=tally.watching(estimator.solve))
        if implicit
        else estimator
    )
    counted = bilevel(tally.counting(problem), solver=solver, estimator=watched)
    plain = bilevel(problem, solver=solver, estimator=estimator)
    try:
        counted(outer, episode)
        # The first call evaluates the inner loss once more, to check the problem.
        tally.losses = tally.products = 0
        hypergrad(counted)(outer, episode)
    except NonFiniteError:
        return Report(gradients=tally.losses, implicit=implicit)
    report = observe(plain, outer, episode, seeds=seeds, fresh_process=fresh_process)
    report.gradients, report.implicit = tally.losses, implicit
    report.linear_residual = tally.residual
    if implicit:
        report.products = tally.products + 1
    elif hasattr(estimator, "last"):
        steps = solver.steps
        report.products = steps if estimator.last is None else min(estimator.last, steps)
    return report


def observe(
    meta_loss: MetaLoss,
    outer: Params,
    episode: Episode,
    *,
    seeds: int = 1,
    fresh_process: bool = False,
) -> Report:
    """Run any meta-loss for its hypergradients and its memory."""
    gradient = hypergrad(meta_loss)

    def run() -> Tensor:
        return flat(gradient(outer, episode)[0])

    draws = []
    with kept(pt.tensors((outer, episode))):
        try:
            for seed in range(seeds):
                torch.manual_seed(seed)
                draws.append(run())
            peak = peak_rss(run) if fresh_process else peak_bytes(run, draws[0].device)[1]
        except NonFiniteError:
            return Report()
    return Report(draws=torch.stack(draws), peak=peak)


def inner_residual(problem: Problem, outer: Params, episode: Episode, solver: Solver) -> float:
    """Return the norm of the inner gradient after the inner loop over that before; NaN if lost."""
    try:
        solution = adapt(problem, outer, episode.support, solver=solver)
    except NonFiniteError:
        return math.nan
    outer = pt.detach(outer)
    support = pt.detach(problem.prepared(outer, episode).support)
    start = pt.detach(problem.start(outer, support))
    before, after = (
        gradient_norm(problem.inner_loss, Point(fast, outer, support))
        for fast in (start, solution.params)
    )
    return float(after / before)


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds that a call takes, with what it left running on the device."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flat(grads: Params) -> Tensor:
    """Return a hypergradient as one float64 vector, in the order of the names."""
    return torch.cat([g.detach().reshape(-1).double() for _, g in sorted(grads.items())])
