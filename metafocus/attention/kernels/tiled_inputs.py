"""Rows, keys and probabilities of tiles: what every pass over an attention matrix shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from metafocus.attention.kernels.kernel import QKV, Scaling
from metafocus.attention.kernels.tiles import Tile, tiles
from metafocus.masks.spans import Spans
from metafocus.precision import wide


@dataclass(frozen=True)
class TiledInputs:
    """Inputs laid out for tiles, in the precision of the computation.

    Attributes:
        q: `scale q`, `[B, Hkv, G, S, D]`; half precision is as it was, and products are scaled.
        k: `[B, Hkv, S, D]`.
        v: `[B, Hkv, S, Dv]`.
        spans: `[B, S]`.
        scale: What is left to scale products with `q` by, or None.
        softcap: The soft cap of the logits, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    spans: Spans
    scale: float | None
    softcap: float | None

    @classmethod
    def of(cls, inputs: QKV, spans: Spans, scaling: Scaling) -> TiledInputs:
        """Lay inputs out: half precision is widened to float32, query heads are grouped."""
        q, k, v = (wide(x) for x in inputs)
        q = q.unflatten(1, (k.shape[1], -1))
        if inputs.q.dtype != q.dtype:
            # Rounded to TF32, `scale q` would move large logits by more than half precision does.
            return cls(q, k, v, spans, scaling.scale, scaling.softcap)
        return cls(q * scaling.scale, k, v, spans, None, scaling.softcap)

    def scaled(self, product: Tensor) -> Tensor:
        """Scale a product with `q` in place, where `q` is not scaled itself."""
        return product if self.scale is None else product.mul_(self.scale)

    def tiles(self) -> Iterator[Tile]:
        """Cut the attention matrix into tiles."""
        return tiles(self.spans, self.k.shape[1], self.q.shape[2])

    def grouped(self, x: Tensor) -> Tensor:
        """Lay out rows `[B, H, S, n]` like `q`: `[B, Hkv, G, S, n]`, in its precision."""
        return wide(x).unflatten(1, (self.k.shape[1], -1))

    def empty(self, width: int) -> Tensor:
        """Make rows of zeros, `[B, Hkv, G, S, width]`: what a query without keys gets."""
        return self.q.new_zeros(*self.q.shape[:-1], width)

    def logits(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """Return a tile's logits, -inf outside the spans, and the tanh of its soft cap."""
        z = self.scaled(rows(self.q, tile) @ keys(self.k, tile).transpose(-1, -2))
        capped = None
        if self.softcap is not None:
            capped = z.div_(self.softcap).tanh_()
            z = capped * self.softcap
        if tile.allowed is not None:
            # The query heads of a group follow each other and see the same keys.
            z.unflatten(-2, (self.q.shape[2], -1)).masked_fill_(~tile.allowed, -torch.inf)
        return z, capped

    def probabilities(self, tile: Tile, lse: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a tile's attention probabilities and the tanh of its soft cap."""
        z, capped = self.logits(tile)
        return z.sub_(rows(lse, tile)).exp_(), capped


def rows(x: Tensor, tile: Tile) -> Tensor:
    """Take a tile's rows of `[B, Hkv, G, S, n]`, one query head of the group after another."""
    return x[tile.rows, tile.heads, :, tile.queries].flatten(2, 3)


def keys(x: Tensor, tile: Tile) -> Tensor:
    """Take a tile's keys of `[B, Hkv, S, n]`."""
    return x[tile.rows, tile.heads, tile.keys]


def put_rows(x: Tensor, tile: Tile, value: Tensor) -> None:
    """Write a tile's rows of `[B, Hkv, G, S, n]`; a row belongs to one tile only."""
    x[tile.rows, tile.heads, :, tile.queries] = value.unflatten(2, (x.shape[2], -1))


def add_keys(x: Tensor, tile: Tile, value: Tensor) -> None:
    """Add to a tile's keys of `[B, Hkv, S, n]`."""
    x[tile.rows, tile.heads, tile.keys] += value
