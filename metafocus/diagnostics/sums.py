"""One pass over an attention matrix, tile by tile, with sums for every query and every key."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from metafocus.attention.kernels.kernel import QKV, Scaling
from metafocus.attention.kernels.tiled_inputs import TiledInputs, put_rows
from metafocus.attention.kernels.tiles import Tile
from metafocus.diagnostics.roles import Tokens, block_size
from metafocus.masks.spans import Spans

FIRST, FEW, CONTEXT, NEEDLE, ENTROPY, EFFECTIVE = range(6)
"""The columns of `Sums.rows`. The first four are those of `Tokens.keys`."""

LOWEST = -1e4
"""A log-probability whose exponential is 0 in every type. Unlike -inf, its product with 0 is 0."""


class Sums(NamedTuple):
    """The sums over the attention matrix `p` of a layer. No tensor has the size `S x S`.

    Attributes:
        rows: `[B, H, S, 6]`: for each query the mass on four sets of keys, the entropy, and the
            effective number of keys.
        columns: `[B, H, 3, S]`: for each key the mass that the members of each set of queries put
            on it.
        cells: `[B, n, n]`: the mass from a block of queries to a block of keys, as a mean over
            heads and over the queries of the block. NaN if a block has only padding.
    """

    rows: Tensor
    columns: Tensor
    cells: Tensor


def attention_sums(
    q: Tensor, k: Tensor, spans: Spans, scaling: Scaling, sinks: Tensor | None, tokens: Tokens
) -> Sums:
    """Compute the probabilities from `q` and `k`, one block of queries at a time, and sum them up.

    Args:
        q: `[B, H, S, D]`.
        k: `[B, Hkv, S, D]`.
        spans: `[B, S]`.
        scaling: The scale and the soft cap.
        sinks: `[H]`, learned logits that belong to no key, or None.
        tokens: The roles of the tokens.
    """
    # The values are not used: any tensor with the right number of heads will do.
    tiled = TiledInputs.of(QKV(q, k, k), spans, scaling)
    batch, heads, group, length, _ = tiled.q.shape
    size = block_size(length)
    side = -(-length // size)
    rows = tiled.empty(EFFECTIVE + 1)
    columns = tiled.q.new_zeros(batch, heads, group, tokens.queries.shape[1], length)
    cells = tiled.q.new_zeros(batch, side, side)
    members, weights = tokens.queries.to(tiled.q.dtype), tokens.keys.to(tiled.q.dtype)
    for tile in tiled.tiles():
        p, entropy = _probabilities(tiled, tile, sinks)
        mass = p @ weights[tile.rows, None, None, tile.keys]
        mass[..., CONTEXT] -= _to_itself(p, tile, weights[..., CONTEXT])
        found = torch.cat((mass, entropy, entropy.exp()), -1)
        put_rows(rows, tile, rearrange(found, "b kv g q n -> b kv (g q) n"))
        chosen = members[tile.rows, None, None, :, tile.queries]
        columns[tile.rows, tile.heads, :, :, tile.keys] += chosen @ p
        _add_cells(cells[tile.rows], p.sum((1, 2)), tile, size)
    counts = _blocks(tokens.valid.to(cells.dtype), 0, size).unsqueeze(-1) * heads * group
    cells = torch.where(counts > 0, cells / counts.clamp(min=1), torch.nan)
    rows = rearrange(rows, "b kv g s n -> b (kv g) s n")
    return Sums(rows, rearrange(columns, "b kv g n s -> b (kv g) n s"), cells)


def _probabilities(tiled: TiledInputs, tile: Tile, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return probabilities `[B, Hkv, G, queries, keys]` and the entropy of each row `[..., 1]`."""
    group = tiled.q.shape[2]
    z = rearrange(tiled.logits(tile)[0], "b kv (g q) k -> b kv g q k", g=group)
    total = torch.logsumexp(z, -1, keepdim=True)
    if sinks is not None:
        learned = rearrange(sinks.to(z.dtype), "(kv g) -> kv g 1 1", g=group)
        total = torch.logaddexp(total, learned[tile.heads])
    # A query without keys puts no mass anywhere.
    logp = z.sub_(total.masked_fill(total == -torch.inf, 0.0))
    p = logp.exp()
    return p, logp.clamp_(min=LOWEST).mul_(p).sum(-1, keepdim=True).neg_()


def _to_itself(p: Tensor, tile: Tile, weight: Tensor) -> Tensor:
    """Return the mass that each query puts on itself, if its own key counts, `[..., queries]`."""
    here = torch.arange(tile.queries.start, tile.queries.stop, device=p.device) - tile.keys.start
    seen = (here >= 0) & (here < p.shape[-1])
    index = here.clamp(0, p.shape[-1] - 1).expand(p.shape[:-1]).unsqueeze(-1)
    own = p.gather(-1, index).squeeze(-1) * seen
    return own * weight[tile.rows, None, None, tile.queries]


def _add_cells(cells: Tensor, p: Tensor, tile: Tile, size: int) -> None:
    found = _blocks(p, tile.keys.start, size).transpose(-1, -2)
    found = _blocks(found, tile.queries.start, size).transpose(-1, -2)
    i, j = tile.queries.start // size, tile.keys.start // size
    cells[:, i : i + found.shape[-2], j : j + found.shape[-1]] += found


def _blocks(x: Tensor, start: int, size: int) -> Tensor:
    """Sum the last dimension, which begins at token `start`, over blocks of `size` tokens."""
    before = start % size
    after = -(before + x.shape[-1]) % size
    return reduce(F.pad(x, (before, after)), "... (n size) -> ... n", "sum", size=size)
