"""The models, adapters, masks and token policies that a language-model loss accepts."""

from __future__ import annotations

from typing import Any

from torch import nn

from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans


def check_parts(model: nn.Module, adapter: Any, mask: Any, tokens: Any) -> None:
    """Raise for parts that no loss can be made of.

    Raises:
        ProblemError: naming the argument, its value, and what belongs there.
    """
    _check_model(model)
    if isinstance(adapter, type) or not (hasattr(adapter, "init") and hasattr(adapter, "bind")):
        raise ProblemError(
            f"adapter must be an adapter such as mf.LoRA(mf.all_linear), got {adapter!r}."
        )
    for name, policy, example in (
        ("mask", mask, "mf.masks.context_bidirectional"),
        ("tokens", tokens, "mf.answer_tokens"),
    ):
        if not callable(policy):
            raise ProblemError(
                f"{name} must be a function of the batch such as {example}, got {policy!r}."
            )


def _check_model(model: Any) -> None:
    if not hasattr(model, "config") or not hasattr(model.config, "get_text_config"):
        raise ProblemError(
            f"model must be a Hugging Face model, got {type(model).__name__} without a config."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ProblemError(
            f"model is {type(model).__name__}, an encoder with a decoder: losses, masks and chats "
            "here are those of causal language models, such as AutoModelForCausalLM loads."
        )
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ProblemError(
            f"model is {type(model).__name__} with config.output_router_logits=True, which asks "
            "for the auxiliary loss of its router; this loss has none: set it to False."
        )
    learned = getattr(model, "active_peft_config", None)
    if getattr(learned, "is_prompt_learning", False):
        raise ProblemError(
            f"model has a PEFT adapter of type {learned.peft_type.value}, which puts virtual "  # pyright: ignore
            "tokens before the batch: masks and answers would be off by them. Use LoRA."
        )


def checked_spans(spans: Any) -> Spans:
    """Return what a mask policy returned, if it is spans.

    Raises:
        ProblemError: if it is anything else.
    """
    if not isinstance(spans, Spans):
        raise ProblemError(
            "a mask policy returns mf.Spans, one interval of keys per query; this one returned "
            f"{type(spans).__name__}."
        )
    return spans
