"""What an error means: a verdict for each estimator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DIVERGED = 10.0
"""Relative error above which a hypergradient has nothing to do with the exact one."""
CONVERGED = 1e-2
"""Relative residual below which a linear system counts as solved."""
CLOSE = 0.05
"""Relative error up to which a hypergradient is close to the exact one."""
ALIGNED = 0.95
"""Cosine from which a hypergradient has the right direction."""

PAGE = "docs/comparing.md"
ADVICE = {
    "diverged": "lower the inner learning rate, clip, or take fewer steps",
    "zero": "nothing flows: look at what the outer loss depends on",
    "exact": "agrees with the reference to half of the digits",
    "noisy": "draw more, and average",
    "not stationary": "take more inner steps, or unroll",
    "not converged": "give the linear solver more steps, or damping",
    "close": "use it if it is cheaper",
    "right direction, wrong length": "use it with a learning rate of its own",
    "biased": "use another estimator here",
}
"""What to do, by verdict; `docs/comparing.md` has a paragraph on each."""


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on; None where it does not apply.

    Attributes:
        error: relative error; None if some hypergradient was not finite.
        cosine: with the reference.
        norm_ratio: over that of the reference.
        bias: the error of the mean over seeds.
        spread: the standard deviation over seeds.
        stationarity: how stationary the inner solution is, for those that need it.
        linear_residual: of the linear system.
    """

    error: float | None
    cosine: float = 0.0
    norm_ratio: float = 0.0
    bias: float | None = None
    spread: float | None = None
    stationarity: float | None = None
    linear_residual: float | None = None


def verdict(found: Evidence, dtype: torch.dtype, stationary: float) -> str:
    """Return the first of the verdicts that holds.

    Args:
        found: the evidence.
        dtype: of the outer parameters, whose rounding "exact" allows for.
        stationary: the residual up to which a solution counts as stationary.
    """
    if found.error is None or not found.error <= DIVERGED:
        return "diverged"
    if found.norm_ratio == 0 and found.error > 0:
        return "zero"
    # The square root of the rounding unit: half of the digits agree.
    if found.error <= torch.finfo(dtype).eps ** 0.5:
        return "exact"
    if found.bias is not None and found.spread is not None and found.spread > found.bias:
        # The mean over seeds is nearer than the draws are to it: more of them would help.
        return "noisy"
    if found.stationarity is not None and not found.stationarity <= stationary:
        return "not stationary"
    if found.linear_residual is not None and not found.linear_residual <= CONVERGED:
        return "not converged"
    if found.error <= CLOSE:
        return "close"
    if found.cosine >= ALIGNED:
        return "right direction, wrong length"
    return "biased"


def advice(name: str) -> str:
    """Return what to do about a verdict, with the paragraph that explains it.

    Example:
        >>> advice("noisy")
        'noisy: draw more, and average (docs/comparing.md#noisy)'
    """
    anchor = name.replace(",", "").replace(" ", "-")
    return f"{name}: {ADVICE[name]} ({PAGE}#{anchor})"
