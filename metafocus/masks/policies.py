"""The mask policies: causal, full, prefix-LM, FocuSFT's turns, and sliding windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from metafocus.checks import whole
from metafocus.errors import ProblemError
from metafocus.masks.entries import Batch, take
from metafocus.masks.layout import differs, layout_of, least_from, runs_of
from metafocus.masks.spans import Spans

MaskPolicy = Callable[[Batch], Spans]
"""`batch -> Spans`: which keys each query may see, `[B, S]`."""


def causal(batch: Batch) -> Spans:
    """Every token sees its document up to itself: `[document start, i + 1)`.

    Args:
        batch: `input_ids` and optionally `attention_mask`, `document_ids`, each `[B, S]`.

    Returns:
        The spans, `[B, S]`.

    Raises:
        DataError: If padding lies between tokens, or a document continues after another one.

    Example:
        >>> causal({"input_ids": torch.zeros(1, 3)}).stop.tolist()
        [[1, 2, 3]]
    """
    layout = layout_of(batch)
    return layout.spans(layout.start, layout.token + 1)


def full(batch: Batch) -> Spans:
    """Every token sees its whole document.

    Args:
        batch: `input_ids` and optionally `attention_mask`, `document_ids`, each `[B, S]`.

    Returns:
        The spans, `[B, S]`.

    Raises:
        DataError: If padding lies between tokens, or a document continues after another one.

    Example:
        >>> full({"input_ids": torch.zeros(1, 3)}).stop.tolist()
        [[3, 3, 3]]
    """
    layout = layout_of(batch)
    return layout.spans(layout.start, layout.stop)


def prefix_lm(batch: Batch) -> Spans:
    """Tokens before the document's first answer see each other; later tokens are causal.

    A document without an answer is bidirectional everywhere.

    Args:
        batch: `input_ids`, `answer_mask` and optionally `attention_mask`, `document_ids`, `[B, S]`.

    Returns:
        The spans, `[B, S]`.

    Raises:
        ProblemError: If `answer_mask` is missing.
        DataError: If padding lies between tokens, or a document continues after another one.

    Example:
        >>> answer = torch.tensor([[False, False, True, True]])
        >>> prefix_lm({"input_ids": torch.zeros(1, 4), "answer_mask": answer}).stop.tolist()
        [[2, 2, 3, 4]]

    References:
        Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text
        transformer", JMLR 2020.
    """
    layout = layout_of(batch)
    answer = take(batch, "answer_mask", "prefix_lm") & layout.valid
    length = answer.shape[-1]
    next_answer = least_from(torch.where(answer, layout.token, length))
    prefix = torch.minimum(next_answer.gather(-1, layout.start), layout.stop)
    stop = torch.where(layout.token < prefix, prefix, layout.token + 1)
    return layout.spans(layout.start, stop)


def context_bidirectional(batch: Batch) -> Spans:
    """Context turns are bidirectional blocks that also see everything before; answers are causal.

    A block is a maximal run of tokens of one document and one turn that are neither answers nor
    padding. Its tokens see `[document start, end of the block)`. Answer tokens see
    `[document start, i + 1)`.

    Args:
        batch: `input_ids`, `answer_mask`, `turn_ids` and optionally `attention_mask`,
            `document_ids`, each `[B, S]`.

    Returns:
        The spans, `[B, S]`.

    Raises:
        ProblemError: If `answer_mask` or `turn_ids` is missing.
        DataError: If padding lies between tokens, or a document continues after another one.

    Example:
        >>> batch = {
        ...     "input_ids": torch.zeros(1, 5),
        ...     "turn_ids": torch.tensor([[0, 0, 1, 1, 2]]),
        ...     "answer_mask": torch.tensor([[False, False, True, True, False]]),
        ... }
        >>> context_bidirectional(batch).stop.tolist()
        [[2, 2, 3, 4, 5]]

    References:
        FocuSFT, arXiv 2605.09932; the blocks are those of GLM, Du et al., arXiv 2103.10360.
    """
    layout = layout_of(batch)
    answer = take(batch, "answer_mask", "context_bidirectional")
    turns = take(batch, "turn_ids", "context_bidirectional")
    _, end = runs_of(layout.change | differs(turns) | differs(answer))
    return layout.spans(layout.start, torch.where(answer, layout.token + 1, end))


@dataclass(frozen=True)
class sliding_window:
    """Every token sees itself and at most `width - 1` tokens before it, in its document.

    The interval is `[max(document start, i - width + 1), i + 1)`.

    Args:
        width: The number of keys per query, including the query itself.

    Raises:
        ProblemError: If `width` is not an integer of at least 1.

    Example:
        >>> sliding_window(2)({"input_ids": torch.zeros(1, 4)}).start.tolist()
        [[0, 0, 1, 2]]
    """

    width: int

    def __post_init__(self) -> None:
        note = ", since a query always sees itself"
        whole("sliding_window: width", self.width, 1, note=note, error=ProblemError)

    def __call__(self, batch: Batch) -> Spans:
        """Return the spans of `batch`."""
        layout = layout_of(batch)
        start = torch.maximum(layout.start, layout.token - (self.width - 1))
        return layout.spans(start, layout.token + 1)
