"""Tiles: some batch rows, some heads, a block of queries, and all the keys these queries see.

The keys of a block of queries are one interval, so a tile holds whole rows of the attention matrix
and nothing outside the spans. It is small enough for a cache, and its memory does not grow with
the length of the sequence until a single block of queries fills it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans

CAPACITY = 1 << 18
"""Numbers in a tile on a CPU: the fastest of 2^15 ... 2^21 by `benchmarks/attention.py`."""

CAPACITY_GPU = 1 << 25
"""Numbers in a tile elsewhere, where small products leave a device idle: a guess, not measured."""

SMALLEST = 16
"""Queries in a block, at least: below, products are too thin to be fast."""


class Tile(NamedTuple):
    """A block of the attention matrix.

    Attributes:
        rows: The rows of the batch.
        heads: The key heads; each stands for its group of query heads.
        queries: The block of queries.
        keys: All keys that any of these queries sees.
        allowed: `[rows, 1, 1, queries, keys]` boolean, or None if all of them see all of these.
    """

    rows: slice
    heads: slice
    queries: slice
    keys: slice
    allowed: Tensor | None


def tiles(spans: Spans, heads: int, group: int) -> Iterator[Tile]:
    """Cut the part of the attention matrix that lies within the spans into tiles.

    Args:
        spans: `[B, S]`, on the device of the computation; read once on the host.
        heads: Number of key heads.
        group: Query heads for each key head.

    Raises:
        ProblemError: If a span reaches beyond the keys.

    Example:
        >>> spans = Spans(torch.tensor([[0, 0, 0]]), torch.tensor([[2, 2, 3]]))
        >>> [tile.keys for tile in tiles(spans, heads=1, group=1)]
        [slice(0, 3, None)]
    """
    rows, length = spans.start.shape
    if not rows or not length:
        return
    capacity = CAPACITY if spans.start.device.type == "cpu" else CAPACITY_GPU
    every_head = heads * group * length
    together = min(max(capacity // (every_head * length), 1), rows)
    block = min(max(capacity // (together * every_head), SMALLEST), length)
    some = min(max(capacity // (together * group * block * length), 1), heads)
    index = torch.arange(length, device=spans.start.device)
    for row in range(0, rows, together):
        chunk = slice(row, min(row + together, rows))
        part = Spans(spans.start[chunk], spans.stop[chunk])
        for i, (first, last, whole) in enumerate(_bounds(part, block)):
            if first >= last:
                continue
            if first < 0 or last > length:
                raise ProblemError(
                    f"spans reach from {first} to {last}, beyond the {length} keys; an interval "
                    "is start <= key < stop within [0, S)."
                )
            queries = slice(i * block, min((i + 1) * block, length))
            allowed = None
            if not whole:
                keys = index[first:last]
                start, stop = (x[:, queries, None] for x in part)
                allowed = ((start <= keys) & (keys < stop))[:, None, None]
            for head in range(0, heads, some):
                chosen = slice(head, min(head + some, heads))
                yield Tile(chunk, chosen, queries, slice(first, last), allowed)


def _bounds(spans: Spans, block: int) -> list[tuple[int, int, bool]]:
    """Return the first key of each block, one past its last, and whether all queries see all."""
    length = spans.start.shape[-1]
    padding = -length % block
    start, stop = (
        torch.cat((x, x[:, -1:].expand(-1, padding)), dim=-1).unflatten(-1, (-1, block))
        for x in spans
    )
    seen = start < stop
    # A query without keys must not widen the range.
    first = torch.where(seen, start, length).amin((0, 2))
    last = torch.where(seen, stop, 0).amax((0, 2))
    whole = (start.amax((0, 2)) <= first) & (stop.amin((0, 2)) >= last)
    return [(a, b, bool(c)) for a, b, c in torch.stack((first, last, whole.long()), 1).tolist()]
