"""The role of each token of a batch in a profile: query, sink, context or evidence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metafocus import masks
from metafocus.errors import DataError
from metafocus.lm import Batch, all_tokens, answer_tokens
from metafocus.masks.entries import take

SINKS = (1, 4)
"""How many tokens at the start of a document count as the sink."""

MOST_CELLS = 128
"""The largest number of cells along each side of a heat map."""


@dataclass(frozen=True)
class Tokens:
    """The roles of the tokens `[B, S]` of a batch.

    Attributes:
        valid: Whether a token is not padding.
        position: Its index in the document, 0 on padding.
        document: The number of its document, counted over the batch; `documents` on padding.
        documents: The number of documents.
        queries: `[B, 3, S]`, the members of each of `measures.QUERIES`.
        keys: `[B, S, 4]`, 1 on the keys whose mass is summed: the first key, the first four, the
            context without the first key, the evidence.
        needle: Whether it is evidence. None if the batch has no `needle_mask`.
    """

    valid: Tensor
    position: Tensor
    document: Tensor
    documents: int
    queries: Tensor
    keys: Tensor
    needle: Tensor | None

    @classmethod
    def of(cls, batch: Batch) -> Tokens:
        """Return the roles of the tokens of a batch.

        Raises:
            ProblemError: If `answer_mask` is missing.
            DataError: If `needle_mask` has another shape than `input_ids`.
        """
        take(batch, "input_ids", "a profile")
        valid = all_tokens(batch)
        answer = answer_tokens(batch) & valid
        position = masks.positions(batch)
        begins = (valid & (position == 0)).flatten()
        documents = int(begins.sum())
        document = torch.where(valid, (begins.cumsum(0) - 1).view_as(position), documents)
        needle = batch.get("needle_mask")
        if needle is not None and needle.shape != valid.shape:
            raise DataError(
                f"batch['needle_mask'] has shape {list(needle.shape)}, but input_ids has "
                f"{list(valid.shape)}; give one entry per token."
            )
        needle = None if needle is None else needle.bool() & valid
        context = valid & ~answer
        first, few = (valid & (position < n) for n in SINKS)
        evidence = torch.zeros_like(valid) if needle is None else needle
        return cls(
            valid=valid,
            position=position,
            document=document,
            documents=documents,
            queries=torch.stack((answer, context, valid), 1),
            keys=torch.stack((first, few, context & ~first, evidence), -1),
            needle=needle,
        )

    def per_document(self, value: Tensor) -> Tensor:
        """Return the sum of `[B, S]` numbers over each document, `[documents]`."""
        sums = value.new_zeros(self.documents + 1)
        return sums.index_add(0, self.document.flatten(), value.flatten())[:-1]


def block_size(length: int) -> int:
    """Return the number of tokens along the side of one cell of a heat map."""
    return -(-length // MOST_CELLS)
