"""How far hypergradients are from an exact one: error, cosine, norm, and spread over draws."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from metafocus import params as pt
from metafocus.types import Params


@dataclass(frozen=True)
class Agreement:
    """Hypergradients `g_i` against an exact one `e`; relative quantities are over `|e|`.

    Attributes:
        error: `|g_1 - e| / |e|`.
        cosine: between `g_1` and `e`; 0 for a hypergradient of zero.
        norm_ratio: `|g_1| / |e|`.
        bias: `|mean(g) - e| / |e|`; None for one draw.
        spread: standard deviation over the draws, over `|e|`; None for one draw.
    """

    error: float
    cosine: float
    norm_ratio: float
    bias: float | None = None
    spread: float | None = None


def agreement(draws: Iterable[Params], exact: Params) -> Agreement:
    """Compare draws of a hypergradient with the exact one, one draw after another.

    No more than one draw and a running sum are kept, so that large models fit.

    Args:
        draws: at least one.
        exact: of the same names and shapes.
    """
    size = _norm(exact)
    first, total, squares, count = None, None, 0.0, 0
    for draw in draws:
        gap = _norm(pt.sub(draw, exact))
        if first is None:
            length = _norm(draw)
            inner = _dot(draw, exact)
            # Rounding may leave the interval.
            cosine = inner / (size * length) if length > 0 and size > 0 else 0.0
            cosine = min(max(cosine, -1.0), 1.0)
            first = Agreement(_over(gap, size), cosine, _over(length, size))
        squares, count = squares + gap**2, count + 1
        wide = {k: v.double() for k, v in draw.items()}
        total = wide if total is None else pt.add(total, wide)
    assert first is not None and total is not None
    if count == 1:
        return first
    bias = _norm(pt.sub(pt.scale(total, 1 / count), exact))
    variance = max(squares - count * bias**2, 0.0) / (count - 1)
    return Agreement(
        first.error,
        first.cosine,
        first.norm_ratio,
        _over(bias, size),
        _over(math.sqrt(variance), size),
    )


def is_finite(params: Params) -> bool:
    """Return whether every entry is finite."""
    return all(bool(torch.isfinite(v).all()) for v in params.values())


def _dot(a: Params, b: Params) -> float:
    return sum(float((a[k].double() * b[k].double()).sum()) for k in a)


def _norm(a: Params) -> float:
    return math.sqrt(_dot(a, a))


def _over(distance: float, size: float) -> float:
    if distance == 0:
        return 0.0
    return distance / size if size else math.inf
