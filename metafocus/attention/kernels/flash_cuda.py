"""Runs of queries served by fused variable-length kernels, many of them in one call.

The runs of a batch that see keys in one pattern (bidirectional, causal, windows of one width) are
laid out one after another and go through the kernel together: one call for all context turns, one
for all answers. Runs share keys: a later one sees what all earlier ones saw. Their keys are
therefore repeated. So that this costs no more than linear memory, a call takes runs only until
their keys are twice as many as the tokens of the batch; eight context turns with all that is
before them make three calls.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from metafocus.attention.kernels.kernel import QKV, Attended, Scaling
from metafocus.attention.kernels.query_runs import QueryRun
from metafocus.attention.kernels.varlen import Lengths, Varlen
from metafocus.precision import wide_type

REPEATED = 2
"""Keys per call, in units of the tokens of the batch."""


class VarlenCall(NamedTuple):
    """One call: which tokens of the flattened batch `[B S]` it takes, and where sequences end.

    Attributes:
        queries: The queries: a slice where they lie together, else their indices, int64 `[Tq]`.
        keys: The keys, the same way; indices repeat where runs share keys.
        lengths: Where each sequence begins, and what its queries see.
    """

    queries: slice | Tensor
    keys: slice | Tensor
    lengths: Lengths


def varlen_calls(
    runs: Iterable[QueryRun],
    batch: int,
    length: int,
    device: torch.device,
    repeated: int = REPEATED,
) -> Iterator[VarlenCall]:
    """Yield the calls that serve the runs.

    Args:
        runs: The runs of a batch.
        batch: Rows of the batch.
        length: Tokens of a row.
        device: Where the indices go.
        repeated: The keys of one call, at most, in units of `batch * length`. A single run never
            has more than `length`.

    Example:
        >>> runs = [QueryRun(0, 0, 2, 0, 2, -1, -1), QueryRun(0, 2, 4, 0, 4, -1, 0)]
        >>> [call.lengths.keys.tolist() for call in varlen_calls(runs, 1, 4, torch.device("cpu"))]
        [[0, 2], [0, 4]]
    """
    kinds: dict[tuple[int, int], list[QueryRun]] = {}
    for run in runs:
        kinds.setdefault(run.window, []).append(run)
    for members in kinds.values():
        for some in _portions(members, repeated * batch * length):
            rows = [run.row * length for run in some]
            queries = [(r + t.query, r + t.query_end) for r, t in zip(rows, some, strict=True)]
            keys = [(r + t.key, r + t.key_end) for r, t in zip(rows, some, strict=True)]
            lengths = Lengths(
                _cumulative([run.queries for run in some], device),
                _cumulative([run.keys for run in some], device),
                max(run.queries for run in some),
                max(run.keys for run in some),
                *some[0].window,
            )
            yield VarlenCall(_tokens(queries, device), _tokens(keys, device), lengths)


@functools.lru_cache(maxsize=8)
def laid_out(
    runs: tuple[QueryRun, ...], batch: int, length: int, device: torch.device, repeated: int
) -> tuple[VarlenCall, ...]:
    """Return `varlen_calls` of the same arguments, kept for the layers and passes of a step."""
    return tuple(varlen_calls(runs, batch, length, device, repeated))


def _portions(runs: Iterable[QueryRun], most: int) -> Iterator[list[QueryRun]]:
    """Yield consecutive runs that together have at most `most` keys."""
    some: list[QueryRun] = []
    total = 0
    for run in runs:
        if some and total + run.keys > most:
            yield some
            some, total = [], 0
        some.append(run)
        total += run.keys
    if some:
        yield some


def _cumulative(sizes: Sequence[int], device: torch.device) -> Tensor:
    # Made on the device, it would cost a synchronisation.
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device, non_blocking=True)


def _tokens(ranges: Sequence[tuple[int, int]], device: torch.device) -> slice | Tensor:
    """Return the tokens of the ranges, one range after another."""
    if all(end == start for (_, end), (start, _) in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    first, end = torch.tensor(ranges).to(device, non_blocking=True).T
    sizes = end - first
    total = sum(end - first for first, end in ranges)
    # The size is given, because reading it from the device would wait for it.
    shift = torch.repeat_interleave(first - (sizes.cumsum(0) - sizes), sizes, output_size=total)
    return torch.arange(total, device=device) + shift


def forward(
    inputs: QKV,
    runs: tuple[QueryRun, ...],
    scaling: Scaling,
    varlen: Varlen,
    repeated: int = REPEATED,
) -> Attended:
    """Return the output and the logsumexp of each row, 0 where no run is.

    Args:
        inputs: Queries, keys and values, with heads of one size.
        runs: The runs of the batch.
        scaling: The scale and the soft cap of the logits.
        varlen: The kernels.
        repeated: The keys of one call, at most, in units of the tokens of the batch.
    """
    batch, _, length, _ = inputs.q.shape
    q, k, v = map(_flat, inputs)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.zeros(q.shape[:2], dtype=wide_type(q.dtype), device=q.device)
    for queries, keys, lengths in laid_out(runs, batch, length, q.device, repeated):
        taken = QKV(_take(q, queries), _take(k, keys), _take(v, keys))
        o, total = varlen.forward(taken, lengths, scaling)
        out[queries] = o
        lse[queries] = total.mT
    return Attended(_unflat(out, batch), rearrange(lse, "(b s) h -> b h s", b=batch))


def backward(
    do: Tensor,
    inputs: QKV,
    found: Attended,
    runs: tuple[QueryRun, ...],
    scaling: Scaling,
    varlen: Varlen,
    repeated: int = REPEATED,
) -> QKV:
    """Return the gradients of `<do, output>`; those of repeated keys are added in float32.

    Args:
        do: Cotangent of the output.
        inputs: Queries, keys and values, with heads of one size.
        found: What `forward` found.
        runs: The runs of the batch.
        scaling: The scale and the soft cap of the logits.
        varlen: The kernels.
        repeated: The keys of one call, at most, in units of the tokens of the batch.
    """
    batch, _, length, _ = inputs.q.shape
    do, q, k, v, o = map(_flat, (do, *inputs, found.o))
    lse = rearrange(found.lse, "b h s -> (b s) h")
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=wide_type(x.dtype), device=x.device) for x in (k, v))
    for queries, keys, lengths in laid_out(runs, batch, length, q.device, repeated):
        taken = QKV(_take(q, queries), _take(k, keys), _take(v, keys))
        rows = Attended(_take(o, queries), _take(lse, queries).mT.contiguous())
        gq, gk, gv = varlen.backward(_take(do, queries), taken, rows, lengths, scaling)
        dq[queries] = gq
        for total, share in ((dk, gk), (dv, gv)):
            if isinstance(keys, slice):
                total[keys] += share
            else:
                total.index_add_(0, keys, share.to(total.dtype))
    return QKV(*(_unflat(x, batch) for x in (dq, dk.to(k.dtype), dv.to(v.dtype))))


def _flat(x: Tensor) -> Tensor:
    """Return `[B, H, S, D]` as `[B S, H, D]` with dense rows, as a view where that is possible."""
    x = rearrange(x, "b h s d -> (b s) h d")
    return x if x.stride(-1) == 1 else x.contiguous()


def _unflat(x: Tensor, batch: int) -> Tensor:
    return rearrange(x, "(b s) h d -> b h s d", b=batch)


def _take(x: Tensor, tokens: slice | Tensor) -> Tensor:
    return x[tokens] if isinstance(tokens, slice) else x.index_select(0, tokens)
