"""Which tokens a loss scores: functions from a batch to booleans."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metafocus.errors import ProblemError
from metafocus.masks import Batch, positions
from metafocus.masks.entries import take

TokenPolicy = Callable[[Batch], Tensor]
"""`batch -> [B, S]` boolean: which tokens are predicted and scored."""


def answer_tokens(batch: Batch) -> Tensor:
    """Score the tokens of trained answers: the official FocuSFT, and plain fine-tuning.

    Args:
        batch: `input_ids` and `answer_mask`, each `[B, S]`.

    Returns:
        Booleans, `[B, S]`.

    Raises:
        ProblemError: without `answer_mask`.

    Example:
        >>> answers = torch.tensor([[False, True, True]])
        >>> answer_tokens({"input_ids": torch.tensor([[5, 6, 7]]), "answer_mask": answers}).tolist()
        [[False, True, True]]
    """
    if "answer_mask" not in batch:
        raise ProblemError(
            "answer_tokens needs batch['answer_mask'] ([B, S] bool); the batch has "
            f"{sorted(batch)}. metafocus.data.collate makes it."
        )
    return take(batch, "answer_mask", "answer_tokens")


def context_tokens(batch: Batch) -> Tensor:
    """Score the tokens that are neither answers nor padding: adaptation on the context alone.

    Args:
        batch: `input_ids`, `answer_mask` and optionally `attention_mask`, each `[B, S]`.

    Returns:
        Booleans, `[B, S]`.

    Raises:
        ProblemError: without `answer_mask`.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]),
        ...          "answer_mask": torch.tensor([[False, True, True]]),
        ...          "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> context_tokens(batch).tolist()
        [[True, False, False]]
    """
    return all_tokens(batch) & ~answer_tokens(batch)


def all_tokens(batch: Batch) -> Tensor:
    """Score every token that is not padding.

    Args:
        batch: `input_ids` and optionally `attention_mask`, each `[B, S]`.

    Returns:
        Booleans, `[B, S]`.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 0]])}
        >>> all_tokens(batch).tolist()
        [[True, False]]
    """
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def predicted(tokens: TokenPolicy, batch: Batch) -> Tensor:
    """Return which of the scored tokens have something before them in their document, `[B, S]`.

    The first token of a document is predicted from nothing, and so adds to no loss.

    Example:
        >>> predicted(all_tokens, {"input_ids": torch.tensor([[5, 6, 7]])}).tolist()
        [[False, True, True]]
    """
    return tokens(batch) & (positions(batch) > 0)
