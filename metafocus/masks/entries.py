"""How a mask policy reads a batch, and the errors for batches that do not fit."""

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
    """Return an entry of a batch after checks; the answer mask is returned as booleans.

    Raises:
        ProblemError: If the entry is missing; `user` says which function needs it.
        DataError: If its type, shape or values do not fit the `input_ids`.
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
        # If an additive mask or labels were read as booleans, they would mean the opposite.
        refuse(
            ((value != 0) & (value != 1)).any(-1),
            f"{key} has entries other than 0 and 1; give {_BINARY[key]}",
        )
    return value.bool() if key == "answer_mask" else value


def refuse(bad: Tensor, message: str) -> None:
    """Raise if any of the rows `bad`, `[B]`, is True; on CUDA queue the check instead.

    Inside transforms, and for a tensor without values, nothing is checked.
    """
    if transforming() or bad.is_meta:
        return
    if bad.is_cuda:
        assert_later(~bad.any(), message)
    elif bool(bad.any()):
        raise DataError(f"row {bad.nonzero()[0].item()}: {message}")
