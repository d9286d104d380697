"""Keeps encoded chats on disk, under a hash of everything that they depend on."""

from __future__ import annotations

import datetime
import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metafocus.data.chat import Sample
from metafocus.files import replaced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PACKAGES = ("transformers", "tokenizers", "jinja2", "torch")


def key(
    records: Sequence[Any], tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> str | None:
    """Return a hash of the records, the tokenizer, the settings and the code that encodes.

    None says that there is none: a record holds what JSON cannot express, or the tokenizer cannot
    be written as text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    template = json.dumps(tokenizer.chat_template)
    found = hashlib.sha256()
    parts = {
        "settings": settings,
        "template": template,
        # Templates may write the date.
        "date": str(datetime.date.today()) if "strftime_now" in template else None,
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "side": tokenizer.truncation_side,
        "packages": {name: version(name) for name in _PACKAGES},
    }
    try:
        found.update(json.dumps(parts).encode())
        found.update(backend.to_str().encode())
        for path in sorted(Path(__file__).parent.glob("*.py")):
            found.update(path.read_bytes())
        for record in records:
            # The order of the keys stays: templates write the arguments of calls in it.
            found.update(json.dumps(record).encode() + b"\n")
    except (TypeError, ValueError, RecursionError):
        return None
    return found.hexdigest()


def load(directory: str | Path, name: str) -> tuple[list[Sample], dict[str, Any]] | None:
    """Return the samples and what was counted; None if there is no complete file."""
    try:
        kept = torch.load(_path(directory, name), weights_only=True)
        sizes = kept["sizes"].tolist()
        columns = {k: values.split(sizes) for k, values in kept["columns"].items()}
        has = kept["has_needles"]
        samples = [
            {
                k: rows[i].clone()
                for k, rows in columns.items()
                if k != "needle_mask" or bool(has[i])
            }
            for i in range(len(sizes))
        ]
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError):
        return None
    return samples, kept["counts"]


def save(
    directory: str | Path, name: str, samples: Sequence[Sample], counts: Mapping[str, Any]
) -> None:
    """Write samples and what was counted.

    Raises:
        OSError: if they cannot be written.
    """
    columns = {
        k: torch.cat([s[k] if k in s else torch.zeros(len(s["input_ids"])).bool() for s in samples])
        for k in ("input_ids", "turn_ids", "answer_mask", "needle_mask")
    }
    kept = {
        "sizes": torch.tensor([len(s["input_ids"]) for s in samples]),
        "has_needles": torch.tensor(["needle_mask" in s for s in samples]),
        "columns": columns,
        "counts": dict(counts),
    }
    Path(directory).mkdir(parents=True, exist_ok=True)
    with replaced(_path(directory, name)) as part:
        torch.save(kept, part)


def _path(directory: str | Path, name: str) -> Path:
    return Path(directory, f"{name}.pt")
