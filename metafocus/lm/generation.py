"""A prompt that is read under any mask policy, for `generate` to continue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafocus.errors import ProblemError
from metafocus.lm.hf.attention import attending, own_mask
from metafocus.lm.hf.inputs import check_ids, model_inputs
from metafocus.masks import Batch, MaskPolicy, causal, positions


@torch.no_grad()
def prefilled(model: nn.Module, batch: Batch, mask: MaskPolicy) -> dict[str, Any]:
    """Read prompts under a mask policy; return what `model.generate` needs to continue.

    `model.generate` and every server read a prompt causally. Training with a bidirectional context
    reads it otherwise. Here the prompt is read as in training, and what follows is decoded causally
    with the cache:

        model.generate(**prefilled(model, batch, mf.masks.context_bidirectional), max_new_tokens=9)

    The keys and values of the whole prompt are computed once under the mask. The last token is read
    again by `generate`: it sees the whole prompt in either case, so its states are the same. A
    model that makes its causal mask itself reads the whole prompt in `generate`.

    Args:
        model: a Hugging Face causal language model.
        batch: `input_ids` `[B, S]` with padding on the left, and what the mask policy needs.
            Without `turn_ids` and `answer_mask` the prompt is one context turn.
        mask: the mask policy, under which the last token must see the whole prompt.

    Returns:
        `input_ids`, `attention_mask`, `use_cache` and `past_key_values` (without the last one, if
        `generate` reads the whole prompt).

    Raises:
        ProblemError: if the last token does not see the whole prompt, as with padding on the right
            or a sliding window; if the model takes no explicit mask and `mask` is not
            `masks.causal`; if the model keeps no cache, as in training with checkpointing.
        DataError: for tokens that the model has no embeddings for.

    Example:
        >>> import metafocus as mf
        >>> model, tokenizer = mf.models.small(["the cat sat"], vocab_size=300, hidden_size=64)
        >>> batch = tokenizer("the cat", return_tensors="pt")
        >>> read = prefilled(model, batch, mf.masks.context_bidirectional)
        >>> sorted(read)
        ['attention_mask', 'input_ids', 'past_key_values', 'use_cache']
    """
    from transformers import DynamicCache

    ids: Tensor = batch["input_ids"]
    check_ids(model, ids)
    real = batch.get("attention_mask", torch.ones_like(ids))
    batch = {
        "turn_ids": torch.where(real != 0, 0, -1),
        "answer_mask": torch.zeros_like(ids, dtype=torch.bool),
        **batch,
        "attention_mask": real,
    }
    spans, length = mask(batch), ids.shape[1]
    if not bool(
        ((spans.start[:, -1] == length - real.sum(-1)) & (spans.stop[:, -1] == length)).all()
    ):
        raise ProblemError(
            f"mask={getattr(mask, '__name__', mask)}: the last token of every prompt must see the "
            "whole prompt. Put padding on the left, and use a mask without a window."
        )
    # A checkpoint may say use_cache=False: `generate` would then read the prompt twice.
    read = {"input_ids": ids, "attention_mask": real, "use_cache": True}
    if mask is causal and own_mask(model):
        return read
    cache = DynamicCache()
    with attending(model):
        inputs = model_inputs(model, ids, positions(batch), spans)
        model(**{**inputs, "use_cache": True}, past_key_values=cache, logits_to_keep=1)
    if cache.get_seq_length() != length:
        raise ProblemError(
            f"{type(model).__name__} kept no cache of the prompt: call model.eval() first "
            "(activation checkpointing turns the cache off in training mode)."
        )
    cache.crop(-1)
    return {**read, "past_key_values": cache}
