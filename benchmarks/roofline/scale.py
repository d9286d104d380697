"""Sizes that can be recognised in any tensor, and what they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from benchmarks.focusft_step import Size

RECORDED = Size(
    vocabulary=1187,
    hidden=280,
    intermediate=1480,
    layers=8,
    heads=28,
    kv_heads=4,
    tied=False,
    rows=1,
    length=1024,
)
"""The model and the batch that are recorded: no two of its sizes are equal."""
RANK = 33
"""Of the fast weights that are recorded; rank 32 is that of the measured step."""
FEATURES = {280: 3584, 1480: 18944, 1187: 152064, 40: 512, 10: 128, 5: 64, RANK: 32}
"""Features of the recorded model, and those of Qwen2.5-7B."""
COUNTS = {*range(10), 28}
"""Sizes that are the same in both: heads, rows, numbers of turns."""


@dataclass(frozen=True)
class Scale:
    """From recorded shapes to those of Qwen2.5-7B's layers and a row of `length` tokens.

    Args:
        length: Tokens of a row, a multiple of the recorded length.
    """

    length: int

    @property
    def tokens(self) -> int:
        """How many tokens one recorded token stands for."""
        return self.length // RECORDED.length

    def size(self, recorded: int) -> int:
        """Return what one size of a recorded shape stands for: what is no feature is tokens."""
        if recorded in FEATURES:
            return FEATURES[recorded]
        return recorded if recorded in COUNTS else recorded * self.tokens

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape that a recorded tensor stands for."""
        return tuple(map(self.size, x.shape))

    def bytes(self, x: Tensor) -> int:
        """Return the memory that the tensor stands for; what is expanded is read once."""
        dims = zip(self.shape(x), x.stride(), strict=True)
        return math.prod(n for n, stride in dims if stride) * x.element_size()
