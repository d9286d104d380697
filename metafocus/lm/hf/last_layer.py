"""The last layer of a decoder, at the positions that carry loss only.

Above the last layer nothing mixes positions. So its MLP, its queries and its output projection
matter only where the next token is scored, and the other queries need not attend. That is exact:
the loss reads none of what is left out. The layer runs as a whole where that does not hold or
cannot be known: where positions are mixed, where random numbers are drawn, where experts may count
their tokens, and where hooks of a user look on.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.lm.hf import heads, prefix
from metafocus.lm.hf.attention import is_stacked
from metafocus.lm.hf.observers import observed, structure
from metafocus.lm.hf.restricted import LastLayer, Restriction, restricted
from metafocus.lm.hf.side_runs import few_tokens, side_run
from metafocus.rng import Drawn
from metafocus.torch_internals import transforming

_ATTENTION = ("self_attn", "attn", "attention")
_MLP = ("mlp", "feed_forward")
_BY_POSITION = ("q_proj", "o_proj", "out_proj")
_CHECKED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]] = weakref.WeakKeyDictionary()
"""Of each model its structure when it was checked, and the result."""


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

    Checked by three forward passes of a few tokens, again if a module of the model is replaced; a
    model that is compiled, sharded, or without values runs as a whole.
    """
    head: nn.Module | None = heads.output_head(model)
    if head is None or torch.compiler.is_compiling():
        return None
    found = _found(model)
    if found is None or observed(model):
        return None
    now, (checked, agrees) = structure(model), _CHECKED.get(model, (None, False))
    if checked != now:
        agrees = _agrees(model, found)
        _CHECKED[model] = now, agrees
    return found if agrees else None


def _agrees(model: nn.Module, found: LastLayer) -> bool:
    """Return whether one position comes out the same, whatever the other positions are.

    First the others are not a number, which reaches whatever depends on them. That is a check in
    any type, while the roundings of bfloat16 could hide a difference of numbers.
    """
    weight = next(model.parameters())
    if weight.is_meta or prefix.has_own_call(model):
        return False
    with side_run(model):
        inputs = few_tokens(model, 2, 6)
        read = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        read[0, 3] = True
        mask = last_mask(model, inputs["attention_mask"])
        rows = read.flatten().nonzero().squeeze(-1)
        narrow = None if mask is None else at_scored(mask, read)
        try:
            before = Drawn(model.parameters())
            whole = _final(model, inputs)[read]
            if not before.equals(Drawn(model.parameters())):
                return False
            parts = []
            for others in (torch.nan, None):
                with restricted(Restriction(found, rows, narrow, others)):
                    parts.append(_final(model, inputs)[read])
        except (RuntimeError, TypeError, AttributeError, ValueError, LookupError):
            return False
        size = whole.abs().amax()
        # Products of fewer rows may be summed in another order, and a layer rounds about 12 times.
        eps = 16 * torch.finfo(whole.dtype).eps
        same = all(torch.allclose(x / size, whole / size, rtol=0, atol=eps) for x in parts)
        return bool(same and size > 0)


def _final(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return what the head sees."""
    return heads.read_hidden(heads.output_head(model), lambda: model(**inputs))


def _found(model: nn.Module) -> LastLayer | None:
    """Return the parts of the last module that has both an attention and an MLP."""
    for layer in reversed(list(model.modules())):
        children = dict(layer.named_children())
        attention = next((children[name] for name in _ATTENTION if name in children), None)
        mlp = next((children[name] for name in _MLP if name in children), None)
        if attention is not None and mlp is not None:
            if _routes(mlp):
                return None
            inside = dict(attention.named_children())
            parts = [inside[name] for name in _BY_POSITION if name in inside]
            return LastLayer(attention, (mlp, *parts))
    return None


def _routes(mlp: nn.Module) -> bool:
    """Return whether an MLP sends tokens to experts.

    Experts may have room for so many tokens only, and statistics or losses that count them.
    """
    return any(
        isinstance(module, nn.ModuleList) or "expert" in name or "router" in name
        for name, module in mlp.named_modules()
    )


def last_mask(model: nn.Module, mask: Any) -> Tensor | None:
    """Return the stacked spans that the last layer of a model takes; None if it takes none.

    Args:
        model: A Hugging Face causal language model.
        mask: Its masks: one, or one for each kind of layer.
    """
    if isinstance(mask, dict):
        mask = mask.get(model.config.get_text_config().layer_types[-1])  # pyright: ignore
    return mask if isinstance(mask, Tensor) and is_stacked(mask) else None
