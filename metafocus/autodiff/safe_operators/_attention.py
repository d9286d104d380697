"""Attention whose every step has derivatives of every order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metafocus.precision import as_autocast, no_autocast, wide


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `softmax(q k' scale + mask) v` like `F.scaled_dot_product_attention`."""
    query, key, value = as_autocast(query, key, value)
    with no_autocast(query.device):
        return _attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    dtype = query.dtype
    query, key, value = wide(query), wide(key), wide(value)
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(repeats, dim=-3)
        value = value.repeat_interleave(repeats, dim=-3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-1, -2)
    allowed = None
    if is_causal and attn_mask is not None:
        raise ValueError("attention takes is_causal=True or attn_mask, not both.")
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask
    elif attn_mask is not None:
        # -inf is taken out before the softmax: a row of nothing else would be NaN.
        allowed = ~torch.isneginf(attn_mask)
        scores = scores + attn_mask.masked_fill(~allowed, 0.0)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if allowed is not None:
        # A query that may see no key gets zeros, as from the fused kernels.
        weights = weights.masked_fill(~allowed, 0.0)
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    return (weights @ value).to(dtype)


def multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    """Compute `F.multi_head_attention_forward`, which calls the fused attention inside."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.multi_head_attention_forward(*args, **kwargs)
