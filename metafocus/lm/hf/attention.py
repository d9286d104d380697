"""Which attention a Hugging Face model runs with, and the masks that it then takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.attention.hugging_face import IMPLEMENTATIONS, register
from metafocus.attention.kernels.query_runs import remember
from metafocus.calls import changed
from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans, windowed
from metafocus.torch_internals import transforming

_MASKED = {"full_attention", "sliding_attention"}


@contextmanager
def attending(model: nn.Module) -> Iterator[None]:
    """Let a Hugging Face model attend to spans inside a `with` block.

    Its `attn_implementation` is "metafocus" meanwhile, unless `takes_spans(model)` is False or it
    is one of ours already.
    """
    config = model.config.get_text_config()  # pyright: ignore
    if config._attn_implementation in IMPLEMENTATIONS or not takes_spans(model):
        yield
        return
    register()
    with attention_as(config, "metafocus"):
        yield


@contextmanager
def attention_as(config: Any, implementation: str) -> Iterator[None]:
    """Set the attention implementation of a configuration inside a `with` block.

    Args:
        config: The text configuration of a model, which its layers read at every call.
        implementation: Such as "metafocus".
    """
    if config._attn_implementation == implementation:
        yield
        return
    with changed((config, "_attn_implementation", implementation)):
        yield


def attention_name(model: nn.Module) -> str | None:
    """Return the name of a model's attention implementation; None where it has no such setting."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def own_mask(model: nn.Module) -> str | None:
    """Return why a model can only run with its own causal mask; None if it takes explicit ones."""
    config = model.config.get_text_config()  # pyright: ignore
    others = set(getattr(config, "layer_types", None) or ()) - _MASKED
    if others:
        return f"its layers of type {', '.join(sorted(others))} are causal by construction"
    if getattr(model, "_is_stateful", False):
        return "it has recurrent layers, which are causal by construction"
    if config.model_type == "bloom" or getattr(config, "alibi", False) is True:
        return "its ALiBi biases are computed from a mask of padding"
    if config.model_type == "gpt_neo":
        return "its attention adds a causal mask to any other one"
    return None


def takes_spans(model: nn.Module) -> bool:
    """Return whether a model attends to spans inside `attending`.

    It does not if it runs with its own mask only, nor with eager attention, which stays as it is,
    nor with attention dropout, which spans do not have, nor if it takes no attention functions of
    other libraries.
    """
    config = model.config.get_text_config()  # pyright: ignore
    if config._attn_implementation in IMPLEMENTATIONS:
        return True
    dropout = any(getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop"))
    # Doge derives a mask of its own from an explicit one, which must have all entries.
    dynamic = config.model_type == "doge"
    takes_ours = getattr(model, "_supports_attention_backend", False) and not dynamic
    explicit = config._attn_implementation != "eager" and own_mask(model) is None
    return bool(takes_ours and explicit and not dropout)


def replaceable(model: nn.Module) -> Any:
    """Return the text configuration of a model whose attention functions can be replaced.

    Raises:
        ProblemError: If they cannot.
    """
    if not getattr(model, "_supports_attention_backend", False) or not hasattr(model, "config"):
        raise ProblemError(
            f"model {type(model).__name__} does not let its attention be replaced; profiles need a "
            "Hugging Face model that takes attention functions, such as Qwen2, Llama or Gemma."
        )
    return model.config.get_text_config()  # pyright: ignore


def attention_mask(model: nn.Module, spans: Spans) -> Tensor | dict[str, Tensor]:
    """Return spans as the mask that a model takes, one for each kind of its layers.

    Args:
        model: A Hugging Face model, inside `attending`.
        spans: The keys that each query may see; sliding windows of layers narrow them.

    Raises:
        ProblemError: If layers of some type, or the attention implementation, take no such mask.
    """
    config = model.config.get_text_config()  # pyright: ignore
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    reason = own_mask(model)
    if reason is not None:
        raise ProblemError(
            f"{type(model).__name__} takes no explicit mask: {reason}. Use mask=mf.masks.causal "
            "(--mask causal), without packed documents."
        )
    if window is None or (kinds and "sliding_attention" not in kinds):
        return _mask(model, spans)
    narrow = _mask(model, windowed(spans, window))
    if not kinds:
        return narrow
    return {"full_attention": _mask(model, spans), "sliding_attention": narrow}


def read_spans(model: nn.Module, *masks: Tensor | dict[str, Tensor] | None) -> None:
    """Read the spans of masks on the host, all at once: every layer and every pass knows them then.

    Args:
        model: A Hugging Face model.
        masks: Masks that `attention_mask` returned, or of this kind; those without spans are left.
    """
    config = model.config.get_text_config()  # pyright: ignore
    window = getattr(config, "sliding_window", None)
    found = []
    for mask in masks:
        for kind, one in mask.items() if isinstance(mask, dict) else [("", mask)]:
            if one is None or not is_stacked(one) or one.is_meta:
                continue
            found.append((None if kind == "full_attention" else window, Spans.unstack(one)))
    # Transforms hide the numbers of tensors; inside them each kernel reads the spans itself.
    if found and not transforming():
        remember(*found)


def is_stacked(mask: Tensor) -> bool:
    """Return whether a mask is spans as `Spans.stack` makes them."""
    return mask.ndim == 4 and mask.shape[-1] == 2 and mask.dtype == torch.long


def _mask(model: nn.Module, spans: Spans) -> Tensor:
    if takes_spans(model):
        return spans.stack()
    implementation = model.config.get_text_config()._attn_implementation  # pyright: ignore
    # A row of padding sees everything: a row that sees nothing would be NaN in MPT and Doge.
    size = spans.start.shape[-1]
    empty = spans.stop <= spans.start
    opened = Spans(spans.start.masked_fill(empty, 0), spans.stop.masked_fill(empty, size))
    # Eager attention adds its mask, so a boolean one would mask nothing, without an error.
    if implementation == "eager":
        return opened.dense(model.dtype)  # pyright: ignore
    if implementation == "sdpa":
        return opened.dense()
    raise ProblemError(
        f"attn_implementation={implementation!r} takes no explicit mask. Load the model with "
        "attn_implementation='metafocus', 'sdpa' or 'eager', or call "
        "model.set_attn_implementation('sdpa')."
    )
