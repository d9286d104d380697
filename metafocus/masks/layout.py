"""Where documents and runs of equal tokens begin and end in a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metafocus.errors import DataError
from metafocus.masks.entries import Batch, refuse, take
from metafocus.masks.spans import Spans, nonempty


class Layout(NamedTuple):
    """The index of each token and the range of its document; `change` marks where a run begins."""

    valid: Tensor
    token: Tensor
    change: Tensor
    start: Tensor
    stop: Tensor

    def spans(self, start: Tensor, stop: Tensor) -> Spans:
        """Return spans in which padding sees nothing."""
        return nonempty(start, torch.where(self.valid, stop, 0))


def layout_of(batch: Batch) -> Layout:
    """Return the documents and the padding of a batch.

    Raises:
        ProblemError: If `input_ids` is missing.
        DataError: If padding lies between tokens, or a document continues after another one.
    """
    ids = take(batch, "input_ids", "every mask policy")
    if ids.ndim != 2:
        raise DataError(f"input_ids must be [batch, sequence], got shape {list(ids.shape)}")
    index = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    if "attention_mask" in batch:
        valid = take(batch, "attention_mask", "") != 0
    else:
        valid = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    change = differs(valid)
    refuse(
        (change & valid).sum(-1) > 1,
        "attention_mask has padding between tokens; put all padding of a row at its ends",
    )
    if "document_ids" in batch:
        documents = take(batch, "document_ids", "")
        change = change | differs(documents)
        refuse(
            _interleaved(documents, change, valid),
            "document_ids returns to a document after another one began; "
            "keep the tokens of a document together",
        )
    return Layout(valid, index, change, *runs_of(change))


def positions(batch: Batch) -> Tensor:
    """Return the index of each token in its document, 0 on padding: the `position_ids` of a batch.

    Args:
        batch: `input_ids` and optionally `attention_mask`, `document_ids`, each `[B, S]`.

    Returns:
        int64 `[B, S]`.

    Raises:
        DataError: If padding lies between tokens, or a document continues after another one.

    Example:
        >>> ids = torch.tensor([[7, 7, 7, 9, 9]])
        >>> positions({"input_ids": ids, "document_ids": ids}).tolist()
        [[0, 1, 2, 0, 1]]
    """
    layout = layout_of(batch)
    return torch.where(layout.valid, layout.token - layout.start, 0)


def differs(value: Tensor) -> Tensor:
    """Return True where a token differs from the one before; the first token always does."""
    first = torch.ones_like(value[..., :1], dtype=torch.bool)
    return torch.cat((first, value[..., 1:] != value[..., :-1]), dim=-1)


def runs_of(change: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first index of each token's run, and one past its last index."""
    length = change.shape[-1]
    index = torch.arange(length, device=change.device)
    start = torch.where(change, index, 0).cummax(-1).values
    ends = torch.cat((change[..., 1:], torch.ones_like(change[..., :1])), dim=-1)
    return start, least_from(torch.where(ends, index + 1, length))


def least_from(value: Tensor) -> Tensor:
    """Return the smallest entry at or after each token."""
    return value.flip(-1).cummin(-1).values.flip(-1)


def _interleaved(documents: Tensor, change: Tensor, valid: Tensor) -> Tensor:
    """Return in which rows a document has more than one run of tokens, `[B]`."""
    runs = (change & valid).sum(-1)
    # Padding is sorted as part of the row's first document, so that it does not count as another.
    first = documents.gather(-1, valid.int().argmax(-1, keepdim=True))
    ordered = torch.where(valid, documents, first).sort(-1).values
    return runs > differs(ordered).sum(-1)
