"""Where the blocks of queries and keys meet, found on the device and without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from metafocus.masks.spans import Spans


class Blocks(NamedTuple):
    """Which blocks a program walks over, in blocks of `side` queries or keys; all int32.

    Attributes:
        start: `[B, S]`, as in the spans.
        stop: `[B, S]`.
        low_key: `[B, blocks]`, for a block of queries the first key of the first block of keys.
        high_key: One past the last key.
        low_query: `[B, blocks]`, for a block of keys the first query of the first block of queries.
        high_query: One past the last block of queries.
    """

    start: Tensor
    stop: Tensor
    low_key: Tensor
    high_key: Tensor
    low_query: Tensor
    high_query: Tensor


def blocks_of(spans: Spans, side: int) -> Blocks:
    """Lay spans out in blocks.

    Example:
        >>> spans = Spans(torch.zeros(1, 4).long(), torch.tensor([[1, 2, 3, 4]]))
        >>> found = blocks_of(spans, 2)
        >>> found.high_key.tolist(), found.low_query.tolist()
        ([[2, 4]], [[0, 2]])
    """
    start, stop = spans
    length = start.shape[-1]
    count = -(-length // side)
    some = start < stop

    def by_block(x: Tensor, filler: int) -> Tensor:
        # A query without keys must not widen the range.
        x = torch.where(some, x, filler)
        return pad(x, (0, count * side - length), value=filler).unflatten(-1, (count, side))

    low = by_block(start, length).amin(-1) // side * side
    high = by_block(stop, 0).amax(-1)
    first = torch.arange(0, count * side, side, device=start.device)
    meet = (low[:, :, None] < first + side) & (high[:, :, None] > first)
    low_query = torch.where(meet, first[:, None], count * side).amin(1)
    high_query = torch.where(meet, first[:, None] + side, 0).amax(1)
    return Blocks(*(x.int().contiguous() for x in (start, stop, low, high, low_query, high_query)))
