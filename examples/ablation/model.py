"""The model that every cell starts from."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from protocol import Scale
from tasks import prose

from metafocus import models


def load(scale: Scale, source: str, device: str) -> tuple[Any, Any]:
    """Return the model and its tokenizer.

    Args:
        scale: names the model; the quick one has a tiny model with random weights instead.
        source: another directory or hub id to load it from; "" for the scale's own.
        device: where to put it.
    """
    name = source or scale.model
    if not name:
        torch.manual_seed(0)
        made, words = models.small(
            prose("train").sentences, num_hidden_layers=3, max_length=max(scale.chats)
        )
        return made.to(device), words
    model, tokenizer = models.load(name, attn_implementation="sdpa")
    return model.to(device), tokenizer  # pyright: ignore[reportArgumentType]


def checksum(model: Any) -> str:
    """Return the SHA-256 of all parameters: the same weights from another place have the same."""
    found = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        found.update(name.encode())
        found.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
