"""How far a hypergradient is from an exact one: error, cosine, norm, and spread over draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.types import Params

BUCKETS = 256
"""The length of a sketch."""
CHUNK = 2**20


@dataclass(frozen=True)
class Agreement:
    """A hypergradient `g` against an exact one `e`; distances are over `|e|`.

    Attributes:
        error: `|g - e| / |e|`.
        cosine: between `g` and `e`; 0 for a hypergradient of zero.
        norm_ratio: `|g| / |e|`.
        sketch: `(g - e) / |e|`, entry by entry if it has at most 256; otherwise entries are added
            up in 256 buckets with random signs, the same for all. Norms of sketches and of their
            means are then right to about a tenth.
    """

    error: float
    cosine: float
    norm_ratio: float
    sketch: list[float] = field(default_factory=list)


def agreement(draw: Params, exact: Params) -> Agreement:
    """Compare a hypergradient with the exact one; nothing of their size is kept."""
    size, length = norm(exact), norm(draw)
    gap = pt.sub(draw, exact)
    inner = _dot(draw, exact)
    # Rounding may leave the interval.
    cosine = inner / (size * length) if length > 0 and size > 0 else 0.0
    cosine = min(max(cosine, -1.0), 1.0)
    sketch = [x / size if size else x for x in _sketch(gap)]
    return Agreement(_over(norm(gap), size), cosine, _over(length, size), sketch)


def distance(a: Params, b: Params, exact: Params) -> float:
    """Return `|a - b| / |exact|`."""
    return _over(norm(pt.sub(a, b)), norm(exact))


def bias_and_spread(found: Sequence[Agreement]) -> tuple[float, float] | None:
    """Return the error of the mean draw, and the standard deviation of draws; None for one draw."""
    if len(found) < 2:
        return None
    n = len(found)
    mean = [math.fsum(entries) / n for entries in zip(*(a.sketch for a in found), strict=True)]
    bias = math.hypot(*mean)
    variance = max(math.fsum(a.error**2 for a in found) - n * bias**2, 0.0) / (n - 1)
    return bias, math.sqrt(variance)


def is_finite(params: Params) -> bool:
    """Return whether every entry is finite."""
    return all(bool(torch.isfinite(v).all()) for v in params.values())


def _sketch(gap: Params) -> list[float]:
    total = sum(v.numel() for v in gap.values())
    if total <= BUCKETS:
        return [float(x) for k in sorted(gap) for x in gap[k].double().reshape(-1)]
    # The same buckets and signs for every estimator, seed and process.
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(BUCKETS, dtype=torch.float64)
    for part in _parts(gap):
        bucket = torch.randint(BUCKETS, part.shape, generator=generator)
        sign = torch.randint(2, part.shape, generator=generator) * 2 - 1
        found.index_add_(0, bucket, part.double().cpu() * sign)
    return found.tolist()


def _parts(params: Params) -> Iterator[Tensor]:
    for k in sorted(params):
        yield from params[k].reshape(-1).split(CHUNK)


def _dot(a: Params, b: Params) -> float:
    # A part at a time: a copy of everything in float64 would not fit where the model just does.
    pairs = zip(_parts(a), _parts(b), strict=True)
    return sum(float((x.double() * y.double()).sum()) for x, y in pairs)


def norm(a: Params) -> float:
    """Return the norm of all entries together, computed in float64."""
    return math.sqrt(_dot(a, a))


def _over(distance: float, size: float) -> float:
    if distance == 0:
        return 0.0
    return distance / size if size else math.inf
