"""A model and its tokenizer: loaded, or a small one made for the data."""

from __future__ import annotations

import argparse
import pickle
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metafocus.cli import options
from metafocus.cli.saving import saving
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
        DataError: if the model or its tokenizer cannot be loaded, or is too small for `length` or
            for the tokenizer's vocabulary.
    """
    _check_device(args.device)
    torch.manual_seed(args.seed)
    if args.model is None:
        from metafocus.data.tokenizer import train_tokenizer

        tokenizer = train_tokenizer(texts(), vocab_size=args.vocab_size)
        model = small_qwen2(tokenizer, args.hidden_size, args.layers, length, args.attn)
        tokenizer = _as_loaded(tokenizer, model)
    else:
        options.note_unused(args, ("vocab_size", "hidden_size", "layers"), "with --model")
        model, tokenizer = _loaded(args.model, args.attn)
        _check_sizes(model, tokenizer, length)
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


def _as_loaded(tokenizer: Any, model: PreTrainedModel) -> Any:
    """Return the tokenizer that `AutoTokenizer` will find beside the saved model.

    For a Qwen2 it is one that splits words as Qwen2 does, whatever was saved: train with that one.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        with saving(Path(directory), "a tokenizer"):
            tokenizer.save_pretrained(directory)
            model.config.save_pretrained(directory)
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def _loaded(name: str, attn: str) -> tuple[PreTrainedModel, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise DataError(
            f"--model {name!r} cannot be loaded: there is no config.json in it. Give a directory "
            "with a model and its tokenizer, or a hub id."
        )
    try:
        # Said, not left out: transformers would ask at the terminal whether to run code of the hub.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # In bfloat16 most updates of a small learning rate would round to nothing.
        model = AutoModelForCausalLM.from_pretrained(
            name, attn_implementation=attn, dtype=torch.float32, trust_remote_code=False
        )
    except pickle.UnpicklingError as error:
        raise DataError(
            f"--model {name!r} cannot be loaded: its weights are a pickle that holds more than "
            "tensors and could run any code. Save the model as safetensors."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        place = "" if Path(name).is_dir() else "it is not a directory here, and on the hub: "
        raise DataError(
            f"--model {name!r} cannot be loaded: {place}{reason.rstrip('.')}. Give a directory "
            "with a model and its tokenizer, or a hub id."
        ) from error
    if tokenizer.chat_template is None:
        raise DataError(
            f"--model {name!r}: its tokenizer has no chat template. Use an instruction-tuned "
            "model's tokenizer, or set tokenizer.chat_template and save it beside the model."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"--device {name!r} cannot be used: {reason}") from error


def _check_sizes(model: PreTrainedModel, tokenizer: Any, length: int) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise DataError(
            f"--max-length {length} is more than the {most} positions of the model: use at most "
            f"--max-length {most}."
        )
    rows = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportIndexIssue]
    if len(tokenizer) > rows:
        raise DataError(
            f"the tokenizer of --model has {len(tokenizer)} tokens, its model embeddings for "
            f"{rows}: call model.resize_token_embeddings(len(tokenizer)) and save it."
        )
