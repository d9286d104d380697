"""What a mask policy reads off a batch, and the refusal of what does not fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafocus.errors import DataError, ProblemError
from metafocus.torch_internals import assert_later, transforming

Batch = dict[str, Any]
"""`input_ids`, `attention_mask`, `answer_mask`, `turn_ids`: each `[B, S]`; see `data.collate`."""

_MEANING = {
    "input_ids": "the tokens",
    "answer_mask": "True on the tokens to be predicted",
    "turn_ids": "the number of each token's turn, -1 on padding",
}

_BINARY = {
    "answer_mask": "True on answers; from Hugging Face labels: labels != -100",
    "attention_mask": "1 on tokens and 0 on padding; numbers of documents go into document_ids",
}


def take(batch: Batch, key: str, user: str) -> Tensor:
    """Return an entry of a batch, checked to fit its `input_ids`; the answer mask as booleans.

    Raises:
        ProblemError: If it is missing; `user` names who needs it.
        DataError: If its type, its shape or its values do not fit.
    """
    key = key if "input_ids" in batch else "input_ids"
    if key not in batch:
        raise ProblemError(
            f"{user} needs batch[{key!r}] ([B, S]: {_MEANING[key]}), but the batch has only "
            f"{sorted(batch)}; add it (metafocus.data does), or choose another mask policy"
        )
    for name in ("input_ids", key):
        if not isinstance(batch[name], Tensor):
            raise DataError(
                f"batch[{name!r}] is a {type(batch[name]).__name__} and no tensor [B, S]; "
                "metafocus.data.collate makes batches, or use torch.tensor(...)"
            )
    value = batch[key]
    expected = batch["input_ids"].shape
    if value.shape != expected:
        raise DataError(
            f"batch[{key!r}] has shape {list(value.shape)}, but input_ids has {list(expected)}; "
            "give one entry per token"
        )
    if key in _BINARY and value.dtype != torch.bool:
        # An additive mask or labels, read as true and false, would mean the opposite.
        refuse(
            ((value != 0) & (value != 1)).any(-1),
            f"{key} has entries other than 0 and 1; give {_BINARY[key]}",
        )
    return value.bool() if key == "answer_mask" else value


def refuse(bad: Tensor, message: str) -> None:
    """Raise for rows `bad` `[B]` where values can be read; on CUDA queue a check instead."""
    if transforming() or bad.is_meta:
        return
    if bad.is_cuda:
        assert_later(~bad.any(), message)
    elif bool(bad.any()):
        raise DataError(f"row {bad.nonzero()[0].item()}: {message}")
