"""One row of a report: means and intervals over the seeds of one contender in one setting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from metafocus.comparison.agreement import Agreement, bias_and_spread
from metafocus.comparison.inner_curve import diverges
from metafocus.comparison.verdicts import Evidence, verdict
from metafocus.estimators.attached import STATIONARY

T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Two-sided 95 % quantiles of Student's t with 1, 2, ... 30 degrees of freedom."""

BOUNDS = {"relative_error": (0.0, math.inf), "cosine": (-1.0, 1.0), "norm_ratio": (0.0, math.inf)}
"""What has an interval besides the time, and between what it lies."""


def interval(
    values: Sequence[float], low: float = 0.0, high: float = math.inf
) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % interval of a mean (Student's t), cut at what is possible.

    One value has no interval, because it does not show how much others would differ.

    Example:
        >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]
        [0.0, 4.484]
        >>> interval([1.0])
        (None, None)
    """
    n = len(values)
    if n < 2:
        return None, None
    mean = statistics.fmean(values)
    # Beyond 30, to three digits: the first terms of the expansion about the normal quantile.
    quantile = T_95[n - 2] if n - 1 <= len(T_95) else 1.96 + 2.4 / (n - 1)
    reach = quantile * statistics.stdev(values) / math.sqrt(n)
    return max(mean - reach, low), min(mean + reach, high)


def of_seeds(row: Mapping[str, Any]) -> str:
    """Return how many seeds a mean is over, if some had no finite hypergradient.

    Example:
        >>> of_seeds({"seeds": 5, "diverged": 4}), of_seeds({"seeds": 5, "diverged": 0})
        (' (1 of 5 seeds)', '')
    """
    left = row.get("diverged")
    return f" ({row['seeds'] - left} of {row['seeds']} seeds)" if left else ""


def _around(first: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return bias and spread at the point of the first seed, from two draws there."""
    noise = first["noise"]
    if noise is None:
        return None
    return math.sqrt(max(first["error"] ** 2 - noise**2, 0.0)), noise


def row(
    name: str, labels: Mapping[str, Any], records: Sequence[Mapping[str, Any]], dtype: torch.dtype
) -> dict[str, Any]:
    """Return a row of a `Comparison`.

    Args:
        name: of the contender.
        labels: the values of the axes.
        records: what was measured, a dict for each seed.
        dtype: of the outer parameters.
    """
    first = records[0]
    finite = [r for r in records if r["error"] is not None]
    means = {
        key: statistics.fmean(r[field] for r in finite) if finite else None
        for key, field in zip(BOUNDS, ("error", "cosine", "norm_ratio"), strict=True)
    }
    seconds = [statistics.median(r["seconds"]) for r in finite]
    found: dict[str, Any] = {
        **labels,
        "name": name,
        **means,
        "seconds": statistics.fmean(seconds) if seconds else None,
        "peak_bytes": first["peak"],
        "gradient_evaluations": first["gradients"],
        "hvp_evaluations": first["products"],
        # JSON has no NaN: after a divergence the residual is none.
        "inner_residual": first["residual"],
        "linear_residual": first["linear_residual"],
    }
    both = None
    if len(records) > 1:
        draws = [Agreement(r["error"], r["cosine"], r["norm_ratio"], r["sketch"]) for r in finite]
        both = bias_and_spread(draws) if "noise" not in first else _around(first)
        found |= {"seeds": len(records), "diverged": len(records) - len(finite)}
        found["spread"] = both and both[1]
        for key, field in zip(BOUNDS, ("error", "cosine", "norm_ratio"), strict=True):
            ends = interval([r[field] for r in finite], *BOUNDS[key])
            found[f"{key}_low"], found[f"{key}_high"] = ends
        found["seconds_low"], found["seconds_high"] = interval(seconds)
    known = [r["reference_error"] for r in records if r["reference_error"] is not None]
    if known:
        found["reference_error"] = max(known)
    if labels:
        found["last_step_rose"] = diverges(first["inner_losses"])
    evidence = Evidence(
        error=means["relative_error"] if len(finite) == len(records) else None,
        cosine=means["cosine"] or 0.0,
        norm_ratio=means["norm_ratio"] or 0.0,
        bias=both and both[0],
        spread=both and both[1],
        stationarity=first["residual"] if first["implicit"] else None,
        linear_residual=first["linear_residual"],
    )
    return {**found, "verdict": verdict(evidence, dtype, STATIONARY)}
