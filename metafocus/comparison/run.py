"""The same problem under many estimators: how wrong, how slow and how large each one is."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from metafocus import params as pt
from metafocus.checks import whole
from metafocus.comparison.agreement import is_finite
from metafocus.comparison.inner_curve import inner_curve
from metafocus.comparison.observe import Report, examine, first_draw, observe, timed
from metafocus.comparison.report import Comparison, environment
from metafocus.engine import MetaLoss, bilevel, hypergrad
from metafocus.errors import NotStationaryWarning, ProblemError, RebuiltWarning
from metafocus.estimators import Estimator
from metafocus.estimators.attached import STATIONARY
from metafocus.problem import Problem, as_episode, constants, refuse_empty
from metafocus.types import Episode, Params, Solver

DIVERGED = 10.0
"""Relative error above which a hypergradient has nothing to do with the exact one."""
CONVERGED = 1e-2
"""Relative residual below which a linear system counts as solved."""
CLOSE = 0.05
"""Relative error up to which a hypergradient is close to the exact one."""
ALIGNED = 0.95
"""Cosine from which a hypergradient has the right direction."""


def compare(
    problem: Problem,
    outer: Params,
    episode: Episode,
    *,
    solver: Solver,
    estimators: Mapping[str, Estimator],
    reference: str | Estimator | Params,
    others: Mapping[str, MetaLoss] | None = None,
    repeats: int = 3,
    seeds: int = 1,
    fresh_process: bool = False,
) -> Comparison:
    """Compute one hypergradient by every estimator and report how they differ and what they cost.

    `problem.init` should return the same start at every call. Timings are interleaved: each
    repetition runs all estimators once.

    Args:
        problem: the bilevel problem.
        outer: where to take the hypergradient.
        episode: support and query.
        solver: the inner optimiser, the same for all.
        estimators: what to compare, by name.
        reference: what to compare with: a name of `estimators`, another estimator, or the exact
            hypergradient itself.
        others: meta-losses of the same problem that are no estimators, such as
            `mf.algorithms.Evolution(...)`, by name.
        repeats: how often each is timed.
        seeds: how many hypergradients to draw of each, under torch seeds 0, 1, ...; an estimator
            with a generator of its own draws on from where it is. Error, cosine and norm are of
            the first; more than one shows noise.
        fresh_process: measure the peak memory of the process instead of that of tensors, each in
            a process of its own (Linux, no CUDA).

    Returns:
        A `Comparison` with `.table()`, `.plot(path)`, `.to_json(path)`, `.to_pandas()`, `.rows`.

    Raises:
        ProblemError: for an unknown or non-finite reference.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> result = mf.compare(
        ...     mf.Problem(loss, loss),
        ...     {"w": torch.ones(2)}, mf.Episode(torch.zeros(2), torch.ones(2)),
        ...     solver=mf.SGD(0.1, steps=3),
        ...     estimators={"full": mf.Unrolled(), "first-order": mf.FirstOrder()},
        ...     reference="full")
        >>> [row["verdict"] for row in result.rows]
        ['exact', 'right direction, wrong length']
    """
    for name, value in (("repeats", repeats), ("seeds", seeds)):
        whole(name, value, 1)
    refuse_empty(outer, "compare")
    if not isinstance(estimators, Mapping) or not (estimators or others):
        raise ProblemError(
            f"estimators must be a dict of at least one, such as {{'full': mf.Unrolled()}}, got "
            f"{estimators!r}."
        )
    outer, others = constants(outer), dict(others or {})
    title = _title(reference, estimators, outer)
    losses: dict[str, MetaLoss] = {
        key: bilevel(problem, solver=solver, estimator=e) for key, e in estimators.items()
    }
    both = sorted(losses.keys() & others.keys())
    if both:
        raise ProblemError(f"{both[0]!r} names an estimator and one of others: rename one.")
    with warnings.catch_warnings():
        # The verdict reports this.
        warnings.simplefilter("ignore", NotStationaryWarning)
        # Each comparison builds its meta losses.
        warnings.simplefilter("ignore", RebuiltWarning)
        exact = _exact(reference, losses, problem, outer, episode, solver)
        if exact is None or not is_finite(exact):
            raise ProblemError(f"the reference hypergradient ({title}) is not finite.")
        curve = inner_curve(problem, outer, as_episode(episode).support, solver)
        reports = {
            key: examine(problem, outer, episode, solver, estimator)
            for key, estimator in estimators.items()
        }
        reports |= {key: Report() for key in others}
        losses |= others
        options: dict[str, Any] = {"seeds": seeds, "fresh_process": fresh_process}
        for key, report in reports.items():
            observe(report, losses[key], outer, episode, exact, **options)
        gradients = {k: hypergrad(losses[k]) for k, r in reports.items() if r.agreement}
        seconds: dict[str, list[float]] = {key: [] for key in gradients}
        for _ in range(repeats):
            for key, gradient in gradients.items():
                seconds[key].append(timed(lambda run=gradient: run(outer, episode)))
    dtype = next(iter(outer.values())).dtype
    rows = [_row(key, report, dtype, seconds.get(key)) for key, report in reports.items()]
    return Comparison(rows, title, environment(dtype), curve)


def _exact(
    reference: Any,
    losses: dict[str, MetaLoss],
    problem: Problem,
    outer: Params,
    episode: Episode,
    solver: Solver,
) -> Params | None:
    if isinstance(reference, dict):
        return pt.detach(reference)
    if isinstance(reference, str):
        return first_draw(losses[reference], outer, episode)
    return first_draw(bilevel(problem, solver=solver, estimator=reference), outer, episode)


def _title(reference: Any, estimators: Mapping[str, Estimator], outer: Params) -> str:
    if isinstance(reference, str):
        if reference not in estimators:
            raise ProblemError(
                f"reference {reference!r} is not one of the estimators {sorted(estimators)}."
            )
        return reference
    if isinstance(reference, dict):
        shapes, expected = pt.shapes(reference), pt.shapes(outer)
        if shapes != expected:
            raise ProblemError(
                f"the reference hypergradient has the shapes {shapes}, outer has {expected}."
            )
        return "the given hypergradient"
    return str(reference)


def _row(
    name: str, report: Report, dtype: torch.dtype, seconds: list[float] | None
) -> dict[str, Any]:
    found = report.agreement
    spread = found and found.spread
    return {
        "name": name,
        "relative_error": found and found.error,
        "cosine": found and found.cosine,
        "norm_ratio": found and found.norm_ratio,
        "seconds": statistics.median(seconds) if seconds else None,
        "peak_bytes": report.peak,
        "gradient_evaluations": report.gradients,
        "hvp_evaluations": report.products,
        "inner_residual": report.residual,
        "linear_residual": report.linear_residual,
        **({} if spread is None else {"spread": spread}),
        "verdict": _verdict(report, dtype),
    }


def _verdict(report: Report, dtype: torch.dtype) -> str:
    """Return the first of the verdicts that holds."""
    found = report.agreement
    if found is None or not found.error <= DIVERGED:
        return "diverged"
    if found.norm_ratio == 0 and found.error > 0:
        return "zero"
    # The square root of the rounding unit: half of the digits agree.
    if found.error <= torch.finfo(dtype).eps ** 0.5:
        return "exact"
    if found.bias is not None and found.spread is not None and found.spread > found.bias:
        # The mean over seeds is nearer than the draws are to it: more of them would help.
        return "noisy"
    if report.implicit and report.residual is not None and not report.residual <= STATIONARY:
        return "not stationary"
    if report.linear_residual is not None and not report.linear_residual <= CONVERGED:
        return "not converged"
    if found.error <= CLOSE:
        return "close"
    if found.cosine >= ALIGNED:
        return "right direction, wrong length"
    return "biased"
