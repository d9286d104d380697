"""The same problem under many estimators: how wrong, how slow and how large each one is."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metafocus.comparison.observe import Report, examine, flat, inner_residual, observe, timed
from metafocus.comparison.report import Comparison, environment
from metafocus.engine import MetaLoss, bilevel, hypergrad
from metafocus.errors import NotStationaryWarning, ProblemError
from metafocus.estimators import Estimator
from metafocus.estimators.attached import STATIONARY
from metafocus.problem import Problem, constants
from metafocus.types import Episode, Params, Solver


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
        ['exact', 'biased']
    """
    for name, value in (("repeats", repeats), ("seeds", seeds)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}.")
    if not outer:
        raise ProblemError(
            "compare needs explicit outer parameters, got {}. Pass dict(model.named_parameters())."
        )
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
        # The verdict says it.
        warnings.simplefilter("ignore", NotStationaryWarning)
        options: dict[str, Any] = {"seeds": seeds, "fresh_process": fresh_process}
        reports = {
            key: examine(problem, outer, episode, solver, estimator, **options)
            for key, estimator in estimators.items()
        }
        for key, meta_loss in others.items():
            reports[key] = observe(meta_loss, outer, episode, **options)
        if isinstance(reference, str):
            draws = reports[reference].draws
        elif isinstance(reference, dict):
            draws = flat(reference)[None]
        else:
            draws = examine(problem, outer, episode, solver, reference).draws
        if draws is None or not torch.isfinite(draws[0]).all():
            raise ProblemError(f"the reference hypergradient ({title}) is not finite.")
        gradients = {
            key: hypergrad(meta_loss)
            for key, meta_loss in {**losses, **others}.items()
            if reports[key].draws is not None
        }
        seconds: dict[str, list[float]] = {key: [] for key in gradients}
        for _ in range(repeats):
            for key, gradient in gradients.items():
                seconds[key].append(timed(lambda run=gradient: run(outer, episode)))
    residual = inner_residual(problem, outer, episode, solver)
    dtype = next(iter(outer.values())).dtype
    rows = [
        _row(key, report, draws[0], dtype, seconds.get(key), residual)
        for key, report in reports.items()
    ]
    return Comparison(rows, title, environment(dtype))


def _title(reference: Any, estimators: Mapping[str, Estimator], outer: Params) -> str:
    if isinstance(reference, str):
        if reference not in estimators:
            raise ProblemError(
                f"reference {reference!r} is not one of the estimators {sorted(estimators)}."
            )
        return reference
    if isinstance(reference, dict):
        shapes, expected = ({k: list(v.shape) for k, v in p.items()} for p in (reference, outer))
        if shapes != expected:
            raise ProblemError(
                f"the reference hypergradient has the shapes {shapes}, outer has {expected}."
            )
        return "the given hypergradient"
    return str(reference)


def _row(
    name: str,
    report: Report,
    exact: Tensor,
    dtype: torch.dtype,
    seconds: list[float] | None,
    residual: float,
) -> dict[str, Any]:
    error = cosine = ratio = spread = bias = None
    if report.draws is not None:
        first, size = report.draws[0], exact.norm()
        error = _over((first - exact).norm(), size)
        found = first.norm()
        cosine = float((first @ exact) / (size * found)) if found > 0 else 0.0
        ratio = float(found / size)
        if len(report.draws) > 1:
            mean = report.draws.mean(0)
            bias = _over((mean - exact).norm(), size)
            spread = _over((report.draws - mean).norm() / (len(report.draws) - 1) ** 0.5, size)
    return {
        "name": name,
        "relative_error": error,
        "cosine": cosine,
        "norm_ratio": ratio,
        "seconds": statistics.median(seconds) if seconds else None,
        "peak_bytes": report.peak,
        "gradient_evaluations": report.gradients,
        "hvp_evaluations": report.products,
        "inner_residual": residual,
        "linear_residual": report.linear_residual,
        **({} if spread is None else {"spread": spread}),
        "verdict": _verdict(error, bias, spread, report.implicit, dtype, residual),
    }


def _over(distance: Tensor, size: Tensor) -> float:
    return float(distance / size) if distance != 0 else 0.0


def _verdict(
    error: float | None,
    bias: float | None,
    spread: float | None,
    implicit: bool,
    dtype: torch.dtype,
    residual: float,
) -> str:
    if error is None or not math.isfinite(error):
        return "diverged"
    # The square root of the rounding unit: half of the digits agree.
    if error <= torch.finfo(dtype).eps ** 0.5:
        return "exact"
    if bias is not None and spread is not None and spread > bias:
        # The mean over seeds is nearer than the draws are to it: more of them would help.
        return "noisy"
    if error > 10:
        return "diverged"
    if implicit and not residual <= STATIONARY:
        return "not stationary"
    return "biased"
