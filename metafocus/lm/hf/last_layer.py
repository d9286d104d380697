"""The last layer of a decoder, at the positions that carry loss only.

Above the last layer nothing mixes positions. So its MLP, its queries and its output projection
matter only where the next token is scored, and the other queries need not attend. That is exact:
the loss reads none of what is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafocus.lm.hf import heads, prefix
from metafocus.lm.hf.attention import is_stacked
from metafocus.lm.hf.restricted import LastLayer, Restriction, restricted
from metafocus.lm.hf.side_runs import side_run, two_tokens
from metafocus.torch_internals import transforming

_ATTENTION = ("self_attn", "attn", "attention")
_MLP = ("mlp", "feed_forward")
_BY_POSITION = ("q_proj", "o_proj", "out_proj")


def restriction(model: nn.Module, rows: Tensor | None, mask: Tensor | None) -> Restriction | None:
    """Return what to restrict the last layer of a model to; None where it is to run as a whole.

    Args:
        model: A Hugging Face causal language model, whose head is split off.
        rows: Flat indices of the positions whose hidden states are read; None: all.
        mask: Spans for these queries, stacked, or None.
    """
    if rows is None or transforming() or prefix.draws_random_numbers(model):
        return None
    found = last_layer(model)
    return None if found is None else Restriction(found, rows, mask)


def at_scored(mask: Tensor, scored: Tensor) -> Tensor:
    """Return stacked spans in which queries that are not `scored`, `[B, S]`, see nothing."""
    return torch.where(scored[:, None, :, None], mask, 0)


def last_layer(model: nn.Module) -> LastLayer | None:
    """Return the parts of a model's last layer, if restricting them changes no scored position.

    Found and checked by two forward passes of two tokens, once per model; a model that is
    compiled, sharded, or without values runs as a whole.

    Args:
        model: A Hugging Face causal language model.
    """
    head: nn.Module | None = heads.output_head(model)
    if head is None or torch.compiler.is_compiling():
        return None
    found = _found(model)
    if found is None:
        return None
    known = heads.install(head).last_layers
    if found not in known:
        known[found] = _agrees(model, found)
    return found if known[found] else None


def _agrees(model: nn.Module, found: LastLayer) -> bool:
    weight = next(model.parameters())
    if weight.is_meta or prefix.has_own_call(model):
        return False
    with side_run(model):
        inputs = two_tokens(model)
        mask = last_mask(model, inputs["attention_mask"])
        last = torch.tensor([[False, True]], device=weight.device)
        narrow = None if mask is None else at_scored(mask, last)
        to = Restriction(found, last.flatten().nonzero().squeeze(-1), narrow)
        try:
            whole = _final(model, inputs)
            with restricted(to):
                part = _final(model, inputs)
        except (RuntimeError, TypeError, AttributeError, ValueError, LookupError):
            return False
        size = whole.abs().amax()
        eps = 64 * torch.finfo(whole.dtype).eps
        same = torch.allclose(part / size, whole / size, rtol=0, atol=eps)
        return bool(same and size > 0)


def _final(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the last position of what the head sees."""
    head = heads.output_head(model)
    return heads.read_hidden(head, lambda: model(**inputs), lambda head, hidden: hidden)[:, -1]


def _found(model: nn.Module) -> LastLayer | None:
    """Return the parts of the last module that has both an attention and an MLP."""
    for layer in reversed(list(model.modules())):
        children = dict(layer.named_children())
        attention = next((children[name] for name in _ATTENTION if name in children), None)
        mlp = next((children[name] for name in _MLP if name in children), None)
        if attention is not None and mlp is not None:
            inside = dict(attention.named_children())
            parts = [inside[name] for name in _BY_POSITION if name in inside]
            return LastLayer(attention, (mlp, *parts))
    return None


def last_mask(model: nn.Module, mask: Any) -> Tensor | None:
    """Return the stacked spans that the last layer of a model takes; None if it takes none.

    Args:
        model: A Hugging Face causal language model.
        mask: Its masks: one, or one for each kind of layer.
    """
    if isinstance(mask, dict):
        mask = mask.get(model.config.get_text_config().layer_types[-1])  # pyright: ignore
    return mask if isinstance(mask, Tensor) and is_stacked(mask) else None
