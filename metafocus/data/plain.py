"""Encodes records that are no chats: plain text, and tokens with labels."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from metafocus.checks import is_whole
from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IGNORED = -100  # transformers' label of a token that is not trained


def encode_plain(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Return the sample of a record with `text`, or with `input_ids` and optionally `labels`.

    Every token of a text is trained, and the token that ends it; the chat template is not used.
    Labels of -100 are not trained. A run of tokens that are trained is a turn, and so is a run of
    others.

    Raises:
        DataError: if the text or the tokens are malformed.

    Example:
        >>> ids = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
        >>> encode_plain(ids, None)["turn_ids"]
        tensor([0, 1, 1])
    """
    if "text" in record:
        ids = _tokens(record["text"], tokenizer)
        if not ids:
            raise DataError(f"the tokenizer makes no token of the text {record['text']!r:.80}")
        trained = [True] * len(ids)
    else:
        ids, trained = _labelled(record)
    # Context first, as in a chat: the turn of an answer has an odd number.
    changes = [a != b for a, b in pairwise(trained)]
    turns = list(accumulate(changes, initial=int(trained[0])))
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64),
        "turn_ids": torch.tensor(turns, dtype=torch.int64),
        "answer_mask": torch.tensor(trained, dtype=torch.bool),
    }


def _tokens(text: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(text, str) or not text:
        raise DataError(f"text is {text!r:.80}: give a string that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"text holds half of a surrogate pair at {error.start}") from error
    encoded: Any = tokenizer(text, verbose=False)
    ids, end = list(encoded["input_ids"]), cast(Any, tokenizer).eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _labelled(record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    ids = _whole("input_ids", record["input_ids"])
    labels = record.get("labels")
    labels = ids if labels is None else _whole("labels", labels, least=_IGNORED)
    mask = record.get("attention_mask")
    mask = [1] * len(ids) if mask is None else _whole("attention_mask", mask)
    if not len(ids) == len(labels) == len(mask):
        raise DataError(
            f"input_ids, labels and attention_mask have {len(ids)}, {len(labels)} and {len(mask)} "
            "entries: give one of each for every token"
        )
    kept = [(i, label) for i, label, here in zip(ids, labels, mask, strict=True) if here]
    odd = next(((i, label) for i, label in kept if label not in (i, _IGNORED)), None)
    if odd is not None:
        raise DataError(
            f"the label {odd[1]} stands at the token {odd[0]}: a label is its own token (the model "
            f"shifts them), or {_IGNORED} where nothing is trained"
        )
    if not kept:
        raise DataError("input_ids is empty: give at least one token")
    return [i for i, _ in kept], [label != _IGNORED for _, label in kept]


def _whole(name: str, values: Any, least: int = 0) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list) or not all(is_whole(value, least) for value in values):
        raise DataError(f"{name} is {values!r:.80}: give a list of integers >= {least}")
    return values
