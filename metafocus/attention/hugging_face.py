"""Span attention as transformers calls it: `attn_implementation="metafocus"`.

These functions are given to transformers, which calls them; they look at no model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.attention.kernels.query_runs import narrowed
from metafocus.attention.ulysses import ulysses_attention
from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans
from metafocus.parallel.collectives import Group

IMPLEMENTATIONS = {
    "metafocus": "auto",
    "metafocus_dense": "dense",
    "metafocus_tiled": "tiled",
    # A name with "flash" in it would make transformers look for a package.
    "metafocus_fused": "flash",
    "metafocus_flex": "flex",
    # This is the same as "metafocus"; the name says that ranks may share the sequence.
    "metafocus_ulysses": "auto",
}
"""The names that transformers knows after `register()`, and the back end of each."""


def register() -> None:
    """Make `attn_implementation="metafocus"` known to transformers.

    Call it before a model is built with that name or `set_attn_implementation("metafocus")`;
    calling it again changes nothing. The name stands for `backend="auto"`; `"metafocus_tiled"`,
    `"metafocus_dense"`, `"metafocus_fused"` (flash) and `"metafocus_flex"` force a back end.

    A model then takes `spans.stack()`, `[B, 1, S, 2]`, as its `attention_mask`, and no `[S, S]`
    tensor is made. Each layer narrows the spans by its own sliding window. A model that is called
    as usual, with a padding mask or in `generate`, works too: with causal spans where there is
    neither padding nor a cache, and else with an ordinary mask and torch's own attention.

    A model that is called with `sequence_group=group`, and with this rank's share of the tokens,
    exchanges queries, keys and values with the other ranks (`ulysses_attention`); the spans are
    then those of the whole sequence. `"metafocus_ulysses"` is the name for it; every other name
    here does the same, with its back end.

    Example:
        >>> register()
        >>> from transformers import AttentionInterface
        >>> "metafocus" in AttentionInterface().valid_keys()
        True
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, backend in IMPLEMENTATIONS.items():
        AttentionInterface.register(name, partial(attend, backend=backend))
        AttentionMaskInterface.register(name, make_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    backend: str,
    sequence_group: Group = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend in one layer: an attention function of transformers.

    Args:
        module: The layer.
        query: `[B, H, S, D]`.
        key: `[B, Hkv, S, D]`.
        value: `[B, Hkv, S, Dv]`.
        attention_mask: Stacked spans `[B, 1, S, 2]`, or a boolean mask `[B, 1, S, keys]`.
        scaling: Factor of the products.
        dropout: Must be 0 with spans.
        sliding_window: The width of the layer's window, or None.
        softcap: The soft cap of the logits, or None.
        s_aux: Sinks `[H]`, or None.
        backend: See `span_attention`.
        sequence_group: The ranks that share the sequence; None: this one has all of it.
        others: What else transformers passes, without a meaning here.

    Returns:
        `[B, S, H, Dv]`, and no weights.

    Raises:
        ProblemError: If there is no mask, or if spans cannot serve what is asked for.
    """
    if attention_mask is None:
        raise ProblemError(
            f"{type(module).__name__} got attention_mask=None, so it is unknown which keys each "
            "query may see. Pass spans.stack() of a mask policy, or a padding mask [B, S]."
        )
    if attention_mask.dtype == torch.bool:
        return _ordinary(
            module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, others
        )
    if dropout:
        raise ProblemError(
            f"attention dropout ({dropout}) is not supported with spans; set "
            "model.config.attention_dropout = 0.0, or call model.eval()."
        )
    if others.get("position_bias") is not None:
        raise ProblemError(
            f"{type(module).__name__} adds a position bias to its logits, which spans do not "
            'have; use attn_implementation="eager".'
        )
    spans = Spans.unstack(attention_mask)
    if sliding_window is not None:
        spans = narrowed(spans, sliding_window)
    out = ulysses_attention(
        query,
        key,
        value,
        spans,
        sequence_group,
        scale=scaling,
        backend=backend,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


def _ordinary(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
    others: dict[str, Any],
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is not None or sinks is not None:
        raise ProblemError(
            f"{type(module).__name__} has a soft cap or sinks, which torch's own attention has "
            "not, and this mask (a cache, or no plain causal one) cannot be written as spans. Call "
            'model.set_attn_implementation("eager") for generation.'
        )
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **others
    )
    return out, None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: Any = None,
    **others: Any,
) -> Tensor:
    """Return causal spans if there is no padding and no cache, else a boolean mask.

    This is a mask function for transformers.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    whole = q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0
    if whole and mask_function is causal_mask_function and attention_mask is None:
        stop = torch.arange(1, q_length + 1, device=device).expand(batch_size, -1)
        return Spans(torch.zeros_like(stop), stop).stack()
    others["allow_is_causal_skip"] = others["allow_is_bidirectional_skip"] = False
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        device=device,
        **others,
    )
    assert mask is not None
    return mask
