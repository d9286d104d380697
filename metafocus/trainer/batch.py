"""Batches as the Trainer has them, with `labels`, and as losses and masks take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.errors import DataError
from metafocus.lm import Batch, answer_tokens
from metafocus.lm.tokens import predicted

_OURS = (
    "input_ids", "attention_mask", "answer_mask", "turn_ids", "document_ids", "needle_mask",
)  # fmt: skip


def as_batch(inputs: Mapping[str, Any]) -> Batch:
    """Return the batch that losses and masks understand, from what a collator made.

    Batches of `metafocus.data` pass as they are. From those of other collators:
    `answer_mask = labels != -100`; documents begin where `position_ids` is 0; a new turn begins
    where the answer mask changes, as in the official FocuSFT.

    Args:
        inputs: `input_ids` `[B, S]` and `answer_mask` or `labels`; optionally `attention_mask`,
            `turn_ids`, `document_ids`, `position_ids`.

    Raises:
        DataError: without input_ids, or with neither answer_mask nor labels.

    Example:
        >>> labels = torch.tensor([[-100, -100, 5, 6]])
        >>> as_batch({"input_ids": torch.tensor([[3, 4, 5, 6]]), "labels": labels})["turn_ids"]
        tensor([[0, 0, 1, 1]])
    """
    batch = {name: inputs[name] for name in _OURS if inputs.get(name) is not None}
    labels = inputs.get("labels")
    if "input_ids" not in batch or ("answer_mask" not in batch and labels is None):
        raise DataError(
            f"a batch needs input_ids and answer_mask or labels; this one has {sorted(inputs)}. "
            "metafocus.data.Collator makes it; with remove_unused_columns=True the Trainer drops "
            "answer_mask and turn_ids."
        )
    if "answer_mask" not in batch:
        batch["answer_mask"] = labels != -100
    if "document_ids" not in batch and inputs.get("position_ids") is not None:
        batch["document_ids"] = (inputs["position_ids"] == 0).cumsum(-1) - 1
    if "turn_ids" not in batch:
        answers = batch["answer_mask"].bool()
        change = torch.zeros_like(batch["input_ids"])
        change[:, 1:] = (answers[:, 1:] != answers[:, :-1]).to(change.dtype)
        batch["turn_ids"] = change.cumsum(-1)
    return batch


def labels_of(batch: Batch) -> Tensor:
    """The batch's labels as transformers needs them: -100 where nothing is predicted, `[B, S]`."""
    return torch.where(predicted(answer_tokens, batch), batch["input_ids"], -100)


@dataclass(frozen=True)
class Labelled:
    """A collator that adds `labels`, by which the Trainer counts tokens over accumulated batches.

    Args:
        collator: makes batches with `answer_mask`, such as `metafocus.data.Collator`; labels that
            it makes itself are kept.
    """

    collator: Callable[[Sequence[Any]], Mapping[str, Any]]

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Collate samples into a batch."""
        batch = dict(self.collator(samples))
        return batch if "labels" in batch else {**batch, "labels": labels_of(as_batch(batch))}


def rows(batch: Batch) -> list[Batch]:
    """The batch as batches of one row."""
    size = len(batch["input_ids"])
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(size)]


def prompts(batch: Batch) -> Batch:
    """What comes before the first answer of each row; the rest is padding, and nothing is a label.

    Raises:
        DataError: for packed rows, in which several documents have a first answer.

    Example:
        >>> batch = {"input_ids": torch.ones(1, 3), "answer_mask": torch.tensor([[False, True, 0]])}
        >>> prompts(batch)["attention_mask"].tolist()
        [[1, 0, 0]]
    """
    if "document_ids" in batch:
        raise DataError(
            "evaluate_on='prompt' adapts to the prompt of one document per row; these rows are "
            "packed (document_ids). Do not pack the evaluation set."
        )
    answers = batch["answer_mask"].bool()
    present = batch.get("attention_mask")
    present = torch.ones_like(batch["input_ids"], dtype=torch.int64) if present is None else present
    kept = present * (answers.cumsum(-1) == 0).to(present.dtype)
    return {**batch, "attention_mask": kept, "answer_mask": torch.zeros_like(answers)}


def without_repeats(batch: Batch, remainder: int, rank: int) -> Batch:
    """The last batch without the answers of samples that only fill it up, to keep ranks even.

    Args:
        batch: of one rank.
        remainder: how many samples are left for all ranks together; none are repeated if it is 0.
        rank: of this process.
    """
    if remainder <= 0:
        return batch
    size = len(batch["input_ids"])
    row = torch.arange(rank * size, (rank + 1) * size, device=batch["input_ids"].device)
    kept = (row < remainder)[:, None]
    return {**batch, "answer_mask": batch["answer_mask"].bool() & kept}


def most_positions(model: nn.Module) -> int | None:
    """How many positions the model's configuration allows; None where it does not say."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def check_length(batch: Batch, model: nn.Module) -> None:
    """Raise if a row is longer than the positions of the model; packed rows count from 0 again."""
    most = most_positions(model)
    length = batch["input_ids"].shape[-1]
    if most is not None and length > most and "document_ids" not in batch:
        raise DataError(
            f"a batch has {length} tokens in a row, the model has {most} positions: encode with "
            f"max_length={most}, or raise the model's max_position_embeddings (and its rope "
            "scaling)."
        )
