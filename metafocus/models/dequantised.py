"""A GGUF file as a directory that transformers loads, with its weights dequantised to float32.

transformers reads the file. What it gets wrong is put right here: floats that GGUF keeps in single
precision, the longest input, and tokenizers that split numbers into digits.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metafocus.errors import DataError, first_line
from metafocus.files import sha256
from metafocus.models import cache

SOURCE = "gguf_source"
"""The name in a model's configuration, and so in its checkpoints, of what it was made from."""

_FORMAT = 1
"""Part of a cached directory's name: to be raised when what is written there changes."""

# The values of tokenizer.ggml.pre, as llama.cpp reads them.
_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_AS_GPT2 = {
    "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de",
    "a.x-4.0", "mellum", "modern-bert", "mpt", "olmo", "jais", "trillion", "granite-docling",
}  # fmt: skip


def directory(path: Path) -> Path:
    """Return a directory of the cache with the model and the tokenizer of a GGUF file.

    Raises:
        DataError: if the file is missing, damaged or of an architecture that transformers does not
            read; if there is no room in the cache.
    """
    if not path.is_file():
        raise DataError(f"name_or_path={str(path)!r} cannot be loaded: there is no such file.")
    name = f"{path.stem}-{sha256(path)[:16]}-{_FORMAT}"
    return cache.made_once(name, lambda part: _write(path, part))


def _write(path: Path, part: Path) -> None:
    header = _header(path)
    size = sum(int(tensor.n_elements) for tensor in header.tensors)
    cache.require_space(part, 4 * size + 2**25)
    print(f"{path.name} is dequantised into {part.parent}, once.", file=sys.stderr)
    try:
        model, tokenizer = _read(path, header)
    # An OSError, too: transformers raises it for a tokenizer that it cannot make.
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = first_line(error)
        raise DataError(
            f"name_or_path={str(path)!r} cannot be loaded: transformers does not read this GGUF "
            f"file of architecture {_value(header, 'general.architecture')!r}: {reason.rstrip('.')}"
            ". Convert the model to safetensors, or use its original."
        ) from error
    setattr(model.config, SOURCE, f"dequantised from {path.name} ({_precision(header)})")
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    except Exception as error:
        # safetensors and tokenizers raise exceptions of their own, for a full disk too.
        raise OSError(str(error)) from error


def _header(path: Path) -> Any:
    """Return the reader of package gguf: it checks that every tensor lies within the file."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    # What it raises depends on where the file ends.
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise DataError(
            f"name_or_path={str(path)!r} cannot be loaded: it is cut off, damaged or no GGUF file "
            f"({error}). Fetch it again."
        ) from error


def _value(header: Any, key: str) -> Any:
    field = header.get_field(key)
    return None if field is None else field.contents()


def _precision(header: Any) -> str:
    """Return how most weights of a file are stored, such as `4-bit weights, Q4_1`."""
    kinds: Counter[str] = Counter()
    for tensor in header.tensors:
        kinds[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = kinds.most_common(1)[0][0]
    bits = re.search(r"\d+", kind)
    return f"{bits.group()}-bit weights, {kind}" if bits else kind


def _read(path: Path, header: Any) -> tuple[Any, Any]:
    import transformers

    place = {"gguf_file": path.name, "trust_remote_code": False}
    # Before 5.21 transformers always dequantised, and had no such class.
    config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config(dequantize=True)} if config else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **place)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **place, **options
    )
    _restore_decimals(vars(model.config))
    _restore_splitting(tokenizer, _value(header, "tokenizer.ggml.pre"), path)
    # Models without attention, such as Mamba, have no longest input.
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None:
        tokenizer.model_max_length = longest
    return model, tokenizer


def _restore_decimals(values: dict[str, Any]) -> None:
    """Replace each float that is single precision by the shortest decimal with its value.

    1e-5 became 9.999999747378752e-06: the same in a float32 model, not in a float64 one.
    """
    for name, value in values.items():
        if isinstance(value, dict):
            _restore_decimals(value)
        elif isinstance(value, float) and math.isfinite(value) and np.float32(value) == value:
            values[name] = float(str(np.float32(value)))


def _restore_splitting(tokenizer: Any, kind: str | None, path: Path) -> None:
    """Let a byte-level tokenizer split numbers into digits where its model was trained so."""
    from tokenizers import pre_tokenizers

    rule = tokenizer.backend_tokenizer.pre_tokenizer
    # transformers gives this splitter, GPT-2's, to every rule that it does not know.
    if not isinstance(rule, pre_tokenizers.ByteLevel):
        return
    if kind in _DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), rule]
        )
    elif kind is not None and kind not in _AS_GPT2:
        warnings.warn(
            f"{path}: transformers does not know how the tokenizer {kind!r} splits words, and "
            "splits them as GPT-2 does: some texts become other tokens than those that the model "
            "was trained on. Where that matters, use the model's original tokenizer.",
            stacklevel=2,
        )
