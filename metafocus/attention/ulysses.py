"""Attention over a sequence that several ranks share: all-to-all, span attention, all-to-all."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor

from metafocus.attention.api import span_attention
from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans
from metafocus.parallel.collectives import Group, exchanged


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    group: Group,
    *,
    scale: float | None = None,
    backend: str = "auto",
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend over spans where each of `n` ranks holds `S / n` consecutive tokens of all heads.

    The ranks exchange their inputs, so that each holds all tokens of `H / n` heads; they attend,
    and exchange the outputs back. Masks, windows and kernels are those of one device. Both
    exchanges are differentiable to any order, so the derivatives are those of `span_attention`.
    Where `n` does not divide the number of key heads, these are repeated as often as needed.

    Args:
        q: This rank's queries, `[B, H, S / n, D]`.
        k: This rank's keys, `[B, Hkv, S / n, D]`.
        v: This rank's values, `[B, Hkv, S / n, Dv]`.
        spans: The keys of each query of the whole sequence, `[B, S]` or `[1, S]`.
        group: The ranks, of `sequence_group`; None: one rank has the whole sequence.
        scale: As for `span_attention`.
        backend: As for `span_attention`.
        softcap: As for `span_attention`.
        sinks: `[H]`, of all heads, or None.

    Returns:
        This rank's outputs, `[B, H, S / n, Dv]`.

    Raises:
        ProblemError: If `n` does not divide the number of query heads, or the spans are not those
            of the whole sequence.
        TransformError: Under `vmap` and in forward mode.

    Example:
        >>> import torch
        >>> q = torch.randn(1, 4, 6, 8)
        >>> causal = Spans(torch.zeros(1, 6, dtype=torch.long), torch.arange(1, 7)[None])
        >>> ulysses_attention(q, q, q, causal, None).shape
        torch.Size([1, 4, 6, 8])

    References:
        Jacobs et al., "DeepSpeed Ulysses", arXiv 2309.14509.
    """
    if group is not None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        _check(q, spans, ranks)
        # Both numbers divide that of the query heads, and so does their least common multiple.
        repeats = math.lcm(k.shape[1], ranks) // k.shape[1]
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        q, k, v = (exchanged(x, group, scatter=1, gather=2) for x in (q, k, v))
        sinks = None if sinks is None else sinks.chunk(ranks)[rank]
    elif spans.start.shape[-1] != q.shape[2]:
        raise ProblemError(
            f"the spans are those of {spans.start.shape[-1]} tokens, and there are {q.shape[2]} "
            "queries. If several ranks share the sequence, call the model with "
            "sequence_group=group; a model that does not pass it on to its attention cannot share."
        )
    out = span_attention(q, k, v, spans, scale=scale, backend=backend, softcap=softcap, sinks=sinks)
    return exchanged(out, group, scatter=2, gather=1)


def _check(q: Tensor, spans: Spans, ranks: int) -> None:
    heads, length = q.shape[1:3]
    if heads % ranks:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ProblemError(
            f"{ranks} ranks cannot share the {heads} query heads of a layer evenly. Choose a "
            f"degree of sequence parallelism that divides them: {', '.join(map(str, fitting))}."
        )
    if spans.start.shape[-1] != length * ranks:
        raise ProblemError(
            f"spans must be those of the whole sequence, {length} tokens on each of {ranks} ranks "
            f"({length * ranks}), got {spans.start.shape[-1]}."
        )
