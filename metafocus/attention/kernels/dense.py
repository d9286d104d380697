"""Attention with all its numbers in memory: the oracle, differentiable to any order."""

from __future__ import annotations

import torch

from metafocus.attention.kernels.kernel import QKV, Attended, Scaling
from metafocus.masks.spans import Spans
from metafocus.precision import wide


def dense(inputs: QKV, spans: Spans, scaling: Scaling) -> Attended:
    """Return the output and the logsumexp of each row, from the whole `[S, S]` matrix."""
    q, k, v = inputs
    group = q.shape[1] // k.shape[1]
    keys, values = (wide(x).repeat_interleave(group, dim=1) for x in (k, v))
    z = (wide(q) * scaling.scale) @ keys.transpose(-1, -2)
    if scaling.softcap is not None:
        z = torch.tanh(z / scaling.softcap) * scaling.softcap
    allowed = spans.dense()
    some = (spans.start < spans.stop)[:, None, :, None]
    # A row without keys takes part with all of them, so that no -inf reaches a derivative.
    z = torch.where(allowed | ~some, z, -torch.inf)
    lse = torch.logsumexp(z, dim=-1, keepdim=True)
    out = torch.where(some, torch.exp(z - lse) @ values, 0.0)
    return Attended(out.to(q.dtype), torch.where(some, lse, 0.0).squeeze(-1))
