"""Which tokens a loss scores: functions from a batch to booleans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metafocus.errors import ProblemError
from metafocus.masks.batch import take

Batch = dict[str, Any]
"""`input_ids`, `attention_mask`, `answer_mask`, `turn_ids`: each `[B, S]`; see `data.collate`."""

TokenPolicy = Callable[[Batch], Tensor]
"""`batch -> [B, S]` boolean: which tokens are predicted and scored."""


def answer_tokens(batch: Batch) -> Tensor:
    """Score the tokens of trained answers: the official FocuSFT, and plain fine-tuning."""
    if "answer_mask" not in batch:
        raise ProblemError(
            "answer_tokens needs batch['answer_mask'] ([B, S] bool); the batch has "
            f"{sorted(batch)}. metafocus.data.collate makes it."
        )
    return take(batch, "answer_mask", "answer_tokens")


def context_tokens(batch: Batch) -> Tensor:
    """Score the tokens that are no answers: adaptation on the context alone."""
    return all_tokens(batch) & ~answer_tokens(batch)


def all_tokens(batch: Batch) -> Tensor:
    """Score every token that is not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
