"""Turns served by fused kernels without any mask: blocks and square triangles of whole tensors.

On a CPU by torch's own kernel; on a GPU by any that `Dense` describes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metafocus.attention.kernels.kernel import QKV, Attended
from metafocus.attention.kernels.query_runs import QueryRun
from metafocus.precision import wide_type
from metafocus.torch_internals import flash_cpu, flash_cpu_backward

WHOLE, LOWER, UPPER = "whole", "lower", "upper"


class Piece(NamedTuple):
    """Keys `[key, key_end)`, and who sees them.

    `WHOLE`: every query sees all. `LOWER`: as many keys as queries, query `i` sees keys up to `i`.
    `UPPER`: as many keys as queries, query `i` sees keys from `i` on.
    """

    key: int
    key_end: int
    shape: str


class Group(NamedTuple):
    """Queries of consecutive rows, and the pieces whose union is what they see."""

    row: int
    row_end: int
    query: int
    query_end: int
    pieces: tuple[Piece, ...]


class Dense(Protocol):
    """Attention to all keys, or causal where there are as many keys as queries; its gradient."""

    def forward(self, inputs: QKV, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return the output and the logsumexp of each row, `[B, H, S]`."""
        ...

    def backward(
        self, do: Tensor, inputs: QKV, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of `<do, output>`."""
        ...


class OnCPU:
    """Torch's fused kernel for CPUs."""

    def forward(self, inputs: QKV, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return the output and the logsumexp of each row."""
        return flash_cpu(*inputs, 0.0, causal, scale=scale)

    def backward(
        self, do: Tensor, inputs: QKV, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients."""
        return flash_cpu_backward(do, *inputs, o, lse, 0.0, causal, scale=scale)


ON_CPU = OnCPU()


@functools.lru_cache(maxsize=8)
def groups(runs: tuple[QueryRun, ...]) -> tuple[Group, ...]:
    """Cut runs into pieces that the kernel knows; equal runs of consecutive rows go together.

    The answers to the last few questions are kept, for the layers and passes of a step.

    Returns:
        The groups. Each costs one call of the kernel per piece, at most three.

    Example:
        >>> groups((QueryRun(0, 2, 4, 0, 4, -1, 0),))[0].pieces
        (Piece(key=0, key_end=2, shape='whole'), Piece(key=2, key_end=4, shape='lower'))
    """
    cut = ((run.row, *part) for run in runs for part in _cut(run))
    by_content = sorted(cut, key=lambda part: (part[1:], part[0]))
    found = []
    # Consecutive rows keep their distance to their place in the sorted list.
    for (_, content), members in groupby(
        enumerate(by_content), lambda p: (p[1][0] - p[0], p[1][1:])
    ):
        rows = [part[0] for _, part in members]
        found.append(Group(rows[0], rows[-1] + 1, *content))
    return tuple(found)


def _cut(run: QueryRun) -> list[tuple[int, int, tuple[Piece, ...]]]:
    """Return the queries of a run, in one or several runs, with the pieces of each."""
    query, end, key, key_end = run[1:5]
    n, m = run.queries, run.keys
    if run.window == (-1, -1):
        return [(query, end, (Piece(key, key_end, WHOLE),))]
    if run.window == (-1, 0):
        pieces = (Piece(key, key_end - n, WHOLE), Piece(key_end - n, key_end, LOWER))
        return [(query, end, _some(pieces))]
    if run.right < 0:
        pieces = (Piece(key, key + n, UPPER), Piece(key + n, key_end, WHOLE))
        return [(query, end, _some(pieces))]
    # A sliding window. A run of queries shorter than the window sees a parallelogram, which is a
    # triangle, what they all see, and another triangle.
    width = m - n + 1
    size = max(1, width - 1)
    parts = []
    for i in range(0, n, size):
        count, first = min(size, n - i), key + i
        pieces = (
            Piece(first, first + count, UPPER),
            Piece(first + count, first + width - 1, WHOLE),
            Piece(first + width - 1, first + width - 1 + count, LOWER),
        )
        if width == 1:
            pieces = (Piece(first, first + 1, WHOLE),)
        parts.append((query + i, query + i + count, _some(pieces)))
    return parts


def _some(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    return tuple(piece for piece in pieces if piece.key < piece.key_end)


def forward(
    inputs: QKV, runs: tuple[QueryRun, ...], scale: float, kernel: Dense = ON_CPU
) -> Attended:
    """Return the output and the logsumexp of each row, 0 where no run is.

    The pieces of a group are merged by `l = log sum exp l_i`, `o = sum_i exp(l_i - l) o_i`, in
    float32 for inputs of half precision.

    Args:
        inputs: Queries, keys and values, with heads of one size.
        runs: The runs of the batch.
        scale: Factor of the logits.
        kernel: What serves a piece.
    """
    inputs = QKV(*map(_dense_rows, inputs))
    q = inputs.q
    batch, heads, length, size = q.shape
    # In the layout [B, S, H, D] merging the heads afterwards is free.
    out = q.new_zeros(batch, length, heads, size).transpose(1, 2)
    lse = q.new_zeros(batch, heads, length, dtype=wide_type(q.dtype))
    for group in groups(runs):
        parts = [
            tuple(_turn_around(x, piece) for x in kernel.forward(tensors, causal, scale))
            for piece in group.pieces
            for tensors, causal in [_arguments(group, piece, inputs)]
        ]
        o, total = parts[0] if len(parts) == 1 else _merge(parts, lse.dtype)
        _queries(out, group).copy_(o)
        _queries(lse, group).copy_(total)
    return Attended(out, lse)


def backward(
    do: Tensor,
    inputs: QKV,
    found: Attended,
    runs: tuple[QueryRun, ...],
    scale: float,
    kernel: Dense = ON_CPU,
) -> QKV:
    """Return the gradients of `<do, output>`.

    A row's probabilities are `exp(z - lse)` and its correction is `<do, o>`, both of the whole row:
    so the kernel's gradient of one piece, given these, is that piece's share of the gradient, and
    the shares are added, in float32 for inputs of half precision.

    Args:
        do: Cotangent of the output.
        inputs: Queries, keys and values, with heads of one size.
        found: What `forward` found.
        runs: The runs of the batch.
        scale: Factor of the logits.
        kernel: What serves a piece.
    """
    inputs = QKV(*map(_dense_rows, inputs))
    rows = _dense_rows(do), _dense_rows(found.o), found.lse
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide_type(x.dtype), device=x.device) for x in inputs)
    for group in groups(runs):
        for piece in group.pieces:
            tensors, causal = _arguments(group, piece, inputs)
            do, o, lse = (_turn_around(_queries(x, group), piece) for x in rows)
            shares = kernel.backward(do, tensors, o, lse, causal, scale)
            gq, gk, gv = (_turn_around(x, piece) for x in shares)
            _queries(dq, group).add_(gq)
            _keys(dk, group, piece).add_(gk)
            _keys(dv, group, piece).add_(gv)
    return QKV(*(d.to(x.dtype) for d, x in zip((dq, dk, dv), inputs, strict=True)))


def _arguments(group: Group, piece: Piece, inputs: QKV) -> tuple[QKV, bool]:
    """Return the inputs of the kernel for a piece, and whether it is causal there."""
    q, *others = inputs
    tensors = (_queries(q, group), *(_keys(x, group, piece) for x in others))
    return QKV(*(_turn_around(x, piece) for x in tensors)), piece.shape != WHOLE


def _queries(x: Tensor, group: Group) -> Tensor:
    return x[group.row : group.row_end, :, group.query : group.query_end]


def _keys(x: Tensor, group: Group, piece: Piece) -> Tensor:
    return x[group.row : group.row_end, :, piece.key : piece.key_end]


def _turn_around(x: Tensor, piece: Piece) -> Tensor:
    """Reverse the rows of an upper triangle, which makes it a lower one, as the kernel needs."""
    return x.flip(2) if piece.shape == UPPER else x


def _merge(parts: Sequence[tuple[Tensor, ...]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    total = torch.stack([lse for _, lse in parts]).logsumexp(0)
    out = torch.zeros_like(parts[0][0], dtype=dtype)
    for o, lse in parts:
        out.addcmul_(o.to(dtype), (lse - total).exp().unsqueeze(-1))
    return out, total


def _dense_rows(x: Tensor) -> Tensor:
    """Return dense rows: the kernel assumes a last stride of 1 and does not check it."""
    return x if x.stride(-1) == 1 else x.contiguous()
