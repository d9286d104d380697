"""A model and its tokenizer: loaded, or a small one made for the data."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_and_tokenizer(
    args: argparse.Namespace, texts: Callable[[], Iterable[str]], length: int
) -> tuple[PreTrainedModel, Any]:
    """Return what `--model` names, or a small Qwen2 with a tokenizer trained on `texts()`.

    Args:
        args: the options of `options.add_model`.
        texts: what to train a tokenizer on, if one is needed.
        length: the longest sequence the small model must take.

    Raises:
        DataError: if the model or its tokenizer cannot be loaded.
    """
    torch.manual_seed(args.seed)
    if args.model is None:
        from metafocus.tokenizer import train_tokenizer

        tokenizer = train_tokenizer(texts(), vocab_size=args.vocab_size)
        model = small_qwen2(tokenizer, args.hidden_size, args.layers, length, args.attn)
    else:
        model, tokenizer = _loaded(args.model, args.attn)
    return model.to(args.device), tokenizer


def small_qwen2(
    tokenizer: Any, hidden: int, layers: int, length: int, attn: str
) -> PreTrainedModel:
    """Return a randomly initialised Qwen2 with grouped-query attention and tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if hidden % 64:
        raise DataError(f"--hidden-size must be a multiple of 64, got {hidden}.")
    heads = hidden // 32
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=max(length, 128),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation(attn)
    return model


def _loaded(name: str, attn: str) -> tuple[PreTrainedModel, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=attn)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"--model {name!r} cannot be loaded: {reason} Give a directory with a model and its "
            "tokenizer, or a hub id."
        ) from error
    if tokenizer.chat_template is None:
        raise DataError(
            f"--model {name!r}: its tokenizer has no chat template. Use an instruction-tuned "
            "model's tokenizer, or set tokenizer.chat_template and save it beside the model."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
