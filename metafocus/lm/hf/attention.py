"""Which attention a Hugging Face model runs with, and the masks that it then takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from metafocus.attention.hugging_face import IMPLEMENTATIONS, register
from metafocus.calls import changed
from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans, windowed


@contextmanager
def attending(model: nn.Module) -> Iterator[None]:
    """Let a Hugging Face model attend to spans inside a `with` block.

    Its `attn_implementation` is "metafocus" meanwhile, unless `takes_spans(model)` is False or it
    is one of ours already.

    Args:
        model: The model.
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


def takes_spans(model: nn.Module) -> bool:
    """Return whether a model attends to spans inside `attending`.

    It does not with eager attention, which stays as it is, nor with attention dropout, which spans
    do not have, nor if it takes no attention functions of other libraries.

    Args:
        model: A Hugging Face model.
    """
    config = model.config.get_text_config()  # pyright: ignore
    if config._attn_implementation in IMPLEMENTATIONS:
        return True
    dropout = any(getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop"))
    takes_ours = getattr(model, "_supports_attention_backend", False)
    return bool(takes_ours and config._attn_implementation != "eager" and not dropout)


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
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise ProblemError(
            f"{type(model).__name__} has layers of type {sorted(unknown)}; only "
            "full_attention and sliding_attention take an explicit mask."
        )
    if window is None or (kinds and "sliding_attention" not in kinds):
        return _mask(model, spans)
    narrow = _mask(model, windowed(spans, window))
    if not kinds:
        return narrow
    return {"full_attention": _mask(model, spans), "sliding_attention": narrow}


def _mask(model: nn.Module, spans: Spans) -> Tensor:
    if takes_spans(model):
        return spans.stack()
    implementation = model.config.get_text_config()._attn_implementation  # pyright: ignore
    # Eager attention adds its mask, so a boolean one would mask nothing, without an error.
    if implementation == "eager":
        return spans.dense(model.dtype)  # pyright: ignore
    if implementation == "sdpa":
        return spans.dense()
    raise ProblemError(
        f"attn_implementation={implementation!r} takes no explicit mask. Load the model with "
        "attn_implementation='metafocus', 'sdpa' or 'eager', or call "
        "model.set_attn_implementation('sdpa')."
    )
