"""A causal language model and its tokenizer: loaded, or a small one made from scratch."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(name_or_path: str | Path, **kwargs: Any) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer from a directory or by a hub id.

    Weights are loaded in float32 unless `dtype` says otherwise: in bfloat16 most updates of a small
    learning rate round to nothing. A tokenizer without a padding token pads with its end token.
    Code that lies beside a model is never run.

    Args:
        name_or_path: a directory with a model and its tokenizer, or a hub id.
        kwargs: of `AutoModelForCausalLM.from_pretrained`, such as `attn_implementation` or
            `dtype`.

    Returns:
        The model and its tokenizer.

    Raises:
        DataError: if the model or its tokenizer cannot be loaded.

    Example:
        >>> made, words = small(["the cat sat on the mat"], vocab_size=300, hidden_size=64)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = made.save_pretrained(folder), words.save_pretrained(folder)
        ...     model, tokenizer = load(folder)
        >>> type(model).__name__, tokenizer.pad_token
        ('Qwen2ForCausalLM', '<|endoftext|>')
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, advice = str(name_or_path), "Give a directory with a model and its tokenizer, or a hub id"
    failed = f"name_or_path={name!r} cannot be loaded"
    here = Path(name).is_dir()
    if here and not (Path(name) / "config.json").is_file():
        raise DataError(f"{failed}: there is no config.json in it. {advice}.")
    try:
        # Passed explicitly: otherwise transformers asks at the terminal whether to run hub code.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=False, **{"dtype": torch.float32, **kwargs}
        )
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{failed}: its weights are a pickle that holds more than tensors and could run any "
            "code. Save the model as safetensors."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        place = "" if here else "it is not a directory on this machine, and on the hub: "
        raise DataError(f"{failed}: {place}{reason.rstrip('.')}. {advice}.") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_tokenizer(name_or_path: str | Path) -> Any:
    """Load a tokenizer alone, from a directory or by a hub id; no code beside it is run.

    Raises:
        DataError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"the tokenizer name_or_path={str(name_or_path)!r} cannot be loaded: {reason}"
        ) from error


def small(
    texts: Iterable[str],
    *,
    vocab_size: int = 2048,
    hidden_size: int = 128,
    num_hidden_layers: int = 4,
    max_length: int = 512,
    attn_implementation: str = "sdpa",
) -> tuple[PreTrainedModel, Any]:
    """Make a small Qwen2 with random weights, and a tokenizer trained on some texts.

    It has grouped-query attention and tied embeddings. Its weights are drawn from torch's global
    generator: call `torch.manual_seed` first.

    Args:
        texts: what the tokenizer learns its merges from.
        vocab_size: the largest number of tokens, at least 259.
        hidden_size: the width, a multiple of 64.
        num_hidden_layers: how many layers.
        max_length: the longest sequence that it must take.
        attn_implementation: as transformers names it.

    Returns:
        The model and its tokenizer, the same that `load` finds once both are saved.

    Raises:
        DataError: for sizes that do not fit, or no text at all.

    Example:
        >>> model, tokenizer = small(["the cat sat on the mat"], vocab_size=300, hidden_size=64,
        ...     num_hidden_layers=1)
        >>> model.config.hidden_size, tokenizer.pad_token
        (64, '<|endoftext|>')
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from metafocus.data.tokenizer import train_tokenizer

    if hidden_size < 64 or hidden_size % 64:
        raise DataError(f"hidden_size={hidden_size} must be a multiple of 64.")
    if num_hidden_layers < 1:
        raise DataError(f"num_hidden_layers={num_hidden_layers} must be at least 1.")
    tokenizer: Any = train_tokenizer(texts, vocab_size=vocab_size)
    heads = hidden_size // 32
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=max(max_length, 128),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation(attn_implementation)
    return model, _as_loaded(tokenizer, config)


def _as_loaded(tokenizer: Any, config: Any) -> Any:
    """Return the tokenizer that `AutoTokenizer` finds beside the saved model.

    Beside a Qwen2 it splits words as Qwen2 does, whatever was saved, so training must use it too.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        try:
            tokenizer.save_pretrained(directory)
            config.save_pretrained(directory)
        except Exception as error:
            # tokenizers raises bare exceptions, for a full disk too.
            raise DataError(
                f"the temporary directory {directory} could not be written to: {error}. Make "
                "room, or name another with TMPDIR."
            ) from error
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def check_fits(model: PreTrainedModel, tokenizer: Any, max_length: int) -> None:
    """Raise if a model is too small for a length of sequences or for its tokenizer.

    Raises:
        DataError: with both numbers and what to do.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and max_length > most:
        raise DataError(
            f"max_length={max_length} is more than the {most} positions of the model: use at most "
            f"{most}."
        )
    rows = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportIndexIssue]
    if len(tokenizer) > rows:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}: call "
            "model.resize_token_embeddings(len(tokenizer)) and save both."
        )
