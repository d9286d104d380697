"""Mask policies: which keys each query of a batch may attend, as one interval per query.

A batch is a dict of `[B, S]` tensors: `input_ids`, `attention_mask` (missing: nothing is padding),
`answer_mask` (True on the tokens to be predicted), `turn_ids` (-1 on padding) and, for packed rows,
`document_ids`. A policy is any function `batch -> Spans`. In every policy here documents do not see
each other, padding sees nothing and is seen by nothing, and padding may be on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metafocus.errors import DataError, ProblemError
from metafocus.levels import transforming
from metafocus.spans import Spans, nonempty

__all__ = [
    "Batch",
    "MaskPolicy",
    "Spans",
    "causal",
    "context_bidirectional",
    "full",
    "positions",
    "prefix_lm",
    "sliding_window",
]

Batch = Mapping[str, Tensor]
MaskPolicy = Callable[[Batch], Spans]

_MEANING = {
    "input_ids": "the tokens",
    "answer_mask": "True on the tokens to be predicted",
    "turn_ids": "the number of each token's turn, -1 on padding",
}


def causal(batch: Batch) -> Spans:
    """Every token sees its document up to itself: `[document start, i + 1)`.

    Args:
        batch: `input_ids` and optionally `attention_mask`, `document_ids`, each `[B, S]`.

    Returns:
        The spans, `[B, S]`.

    Raises:
        DataError: If padding lies between tokens, or a document goes on after another one.

    Example:
        >>> causal({"input_ids": torch.zeros(1, 3)}).stop.tolist()
        [[1, 2, 3]]
    """
    layout = _layout(batch)
    return layout.spans(layout.start, layout.token + 1)


def full(batch: Batch) -> Spans:
    """Every token sees its whole document.

    Args:
        batch: `input_ids` and optionally `attention_mask`, `document_ids`, each `[B, S]`.

    Returns:
        The spans, `[B, S]`.

    Raises:
        DataError: If padding lies between tokens, or a document goes on after another one.

    Example:
        >>> full({"input_ids": torch.zeros(1, 3)}).stop.tolist()
        [[3, 3, 3]]
    """
    layout = _layout(batch)
    return layout.spans(layout.start, layout.stop)


def prefix_lm(batch: Batch) -> Spans:
    """Tokens before the document's first answer see each other; later tokens are causal.

    A document without an answer is bidirectional as a whole.

    Args:
        batch: `input_ids`, `answer_mask` and optionally `attention_mask`, `document_ids`, `[B, S]`.

    Returns:
        The spans, `[B, S]`.

    Raises:
        ProblemError: If `answer_mask` is missing.
        DataError: If padding lies between tokens, or a document goes on after another one.

    Example:
        >>> answer = torch.tensor([[False, False, True, True]])
        >>> prefix_lm({"input_ids": torch.zeros(1, 4), "answer_mask": answer}).stop.tolist()
        [[2, 2, 3, 4]]

    References:
        Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text
        transformer", JMLR 2020.
    """
    layout = _layout(batch)
    answer = take(batch, "answer_mask", "prefix_lm") & layout.valid
    length = answer.shape[-1]
    next_answer = _next(torch.where(answer, layout.token, length))
    prefix = torch.minimum(next_answer.gather(-1, layout.start), layout.stop)
    stop = torch.where(layout.token < prefix, prefix, layout.token + 1)
    return layout.spans(layout.start, stop)


def context_bidirectional(batch: Batch) -> Spans:
    """Context turns are bidirectional blocks that see all before them; answers are causal.

    A block is a maximal run of tokens with the same document and turn, outside `answer_mask` and
    not padding. Its tokens see `[document start, end of the block)`; answer tokens see
    `[document start, i + 1)`.

    Args:
        batch: `input_ids`, `answer_mask`, `turn_ids` and optionally `attention_mask`,
            `document_ids`, each `[B, S]`.

    Returns:
        The spans, `[B, S]`.

    Raises:
        ProblemError: If `answer_mask` or `turn_ids` is missing.
        DataError: If padding lies between tokens, or a document goes on after another one.

    Example:
        >>> batch = {
        ...     "input_ids": torch.zeros(1, 5),
        ...     "turn_ids": torch.tensor([[0, 0, 1, 1, 2]]),
        ...     "answer_mask": torch.tensor([[False, False, True, True, False]]),
        ... }
        >>> context_bidirectional(batch).stop.tolist()
        [[2, 2, 3, 4, 5]]
    """
    layout = _layout(batch)
    answer = take(batch, "answer_mask", "context_bidirectional")
    turns = take(batch, "turn_ids", "context_bidirectional")
    _, end = _runs(layout.change | _differs(turns) | _differs(answer))
    return layout.spans(layout.start, torch.where(answer, layout.token + 1, end))


@dataclass(frozen=True)
class sliding_window:
    """Causal, and at most the `width` latest tokens: `[max(document start, i - width + 1), i + 1)`.

    Args:
        width: Keys per query, the query's own included.

    Raises:
        ProblemError: If `width` is not an integer of at least 1.

    Example:
        >>> sliding_window(2)({"input_ids": torch.zeros(1, 4)}).start.tolist()
        [[0, 0, 1, 2]]
    """

    width: int

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise ProblemError(
                f"sliding_window(width={self.width!r}) must be an integer of at least 1: "
                "a query always sees itself"
            )

    def __call__(self, batch: Batch) -> Spans:
        """The spans of `batch`."""
        layout = _layout(batch)
        start = torch.maximum(layout.start, layout.token - (self.width - 1))
        return layout.spans(start, layout.token + 1)


def positions(batch: Batch) -> Tensor:
    """Index of each token inside its document, 0 on padding: the `position_ids` of a packed batch.

    Args:
        batch: `input_ids` and optionally `attention_mask`, `document_ids`, each `[B, S]`.

    Returns:
        int64 `[B, S]`.

    Raises:
        DataError: If padding lies between tokens, or a document goes on after another one.

    Example:
        >>> ids = torch.tensor([[7, 7, 7, 9, 9]])
        >>> positions({"input_ids": ids, "document_ids": ids}).tolist()
        [[0, 1, 2, 0, 1]]
    """
    layout = _layout(batch)
    return torch.where(layout.valid, layout.token - layout.start, 0)


class _Layout(NamedTuple):
    """Per token: its index and its document's range; `change` marks where a run begins."""

    valid: Tensor
    token: Tensor
    change: Tensor
    start: Tensor
    stop: Tensor

    def spans(self, start: Tensor, stop: Tensor) -> Spans:
        return nonempty(start, torch.where(self.valid, stop, 0))


def _layout(batch: Batch) -> _Layout:
    ids = take(batch, "input_ids", "every mask policy")
    if ids.ndim != 2:
        raise DataError(f"input_ids must be [batch, sequence], got shape {list(ids.shape)}")
    index = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    if "attention_mask" in batch:
        valid = take(batch, "attention_mask", "") != 0
    else:
        valid = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    change = _differs(valid)
    refuse(
        (change & valid).sum(-1) > 1,
        "attention_mask has padding between tokens; put all padding of a row at its ends",
    )
    if "document_ids" in batch:
        documents = take(batch, "document_ids", "")
        change = change | _differs(documents)
        refuse(
            _interleaved(documents, change, valid),
            "document_ids returns to a document after another one began; "
            "keep the tokens of a document together",
        )
    return _Layout(valid, index, change, *_runs(change))


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


def _differs(value: Tensor) -> Tensor:
    """True where a token differs from the one before it; the first token always does."""
    first = torch.ones_like(value[..., :1], dtype=torch.bool)
    return torch.cat((first, value[..., 1:] != value[..., :-1]), dim=-1)


def _runs(change: Tensor) -> tuple[Tensor, Tensor]:
    """First index, and one past the last, of the run each token belongs to."""
    length = change.shape[-1]
    index = torch.arange(length, device=change.device)
    start = torch.where(change, index, 0).cummax(-1).values
    ends = torch.cat((change[..., 1:], torch.ones_like(change[..., :1])), dim=-1)
    return start, _next(torch.where(ends, index + 1, length))


def _next(value: Tensor) -> Tensor:
    """The smallest entry at or after each token."""
    return value.flip(-1).cummin(-1).values.flip(-1)


def _interleaved(documents: Tensor, change: Tensor, valid: Tensor) -> Tensor:
    """Rows in which some document has more than one run of tokens, `[B]`."""
    runs = (change & valid).sum(-1)
    # Padding is sorted as a copy of the row's first document: it must not count as its own.
    first = documents.gather(-1, valid.int().argmax(-1, keepdim=True))
    ordered = torch.where(valid, documents, first).sort(-1).values
    return runs > _differs(ordered).sum(-1)


def refuse(bad: Tensor, message: str) -> None:
    """Raise for rows `bad` `[B]` where values can be read; on CUDA queue a check instead."""
    if transforming() or bad.is_meta:
        return
    if bad.is_cuda:
        torch._assert_async(~bad.any(), message)  # pyright: ignore[reportPrivateImportUsage]
    elif bool(bad.any()):
        raise DataError(f"row {bad.nonzero()[0].item()}: {message}")
