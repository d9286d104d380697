"""Encodes many chats, and keeps those that have an answer to learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metafocus.data.chat import Sample, check_max_length, encode_chat, truncate
from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Samples that have an answer, and how many chats were truncated or dropped.

    Attributes:
        samples: dicts of 1-D tensors, as `encode_chat` makes them.
        dropped: the number of chats without an answer to predict.
        truncated: the number of chats that were cut to `max_length`.
    """

    samples: list[Sample]
    dropped: int
    truncated: int

    def summary(self) -> str:
        """Return one sentence for a log."""
        tokens = sum(len(sample["input_ids"]) for sample in self.samples)
        answers = sum(int(sample["answer_mask"].sum()) for sample in self.samples)
        return (
            f"{len(self.samples)} samples with {tokens} tokens, {answers} of them answers; "
            f"{self.truncated} truncated, {self.dropped} dropped without an answer."
        )


def encode_chats(
    records: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    merge_context: bool = True,
    progress: bool = False,
) -> Encoded:
    """Encode every chat as `encode_chat` does, and drop those without an answer to predict.

    An answer at the first token does not count, because no token comes before it.

    Args:
        records: dicts with `messages` and optionally `tools`.
        tokenizer: a Hugging Face tokenizer with a chat template.
        max_length: the largest number of tokens; the rest is cut on the tokenizer's
            `truncation_side`.
        merge_context: whether consecutive non-assistant messages form one turn.
        progress: whether to show a progress bar.

    Raises:
        DataError: if a record cannot be encoded (the text has its index), or if no record has an
            answer.

    Example:
        >>> from metafocus.data import encode_chats
        >>> from metafocus.data.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["a tiny text"])
        >>> chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
        >>> encode_chats([{"messages": chat}, {"messages": chat[:1]}], tokenizer).summary()
        '1 samples with 25 tokens, 3 of them answers; 0 truncated, 1 dropped without an answer.'
    """
    check_max_length(max_length)
    if isinstance(records, str | Mapping) or not isinstance(records, Iterable):
        raise DataError(
            f"records is a {type(records).__name__}: pass a list of dicts with messages, as "
            "read_chats returns it"
        )
    if progress:
        from tqdm import tqdm

        records = tqdm(records, desc="encoding chats", unit="chat")

    samples: list[Sample] = []
    seen = truncated = cut_off = 0
    for seen, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            raise DataError(f"record {seen - 1}: {record!r:.80} is no dict with messages")
        try:
            whole = encode_chat(
                record.get("messages"),  # pyright: ignore[reportArgumentType]
                tokenizer,
                tools=record.get("tools"),
                merge_context=merge_context,
            )
        except DataError as error:
            raise DataError(f"record {seen - 1}: {error}") from error
        sample = truncate(whole, max_length, tokenizer.truncation_side)
        truncated += sample is not whole
        if sample["answer_mask"][1:].any():
            samples.append(sample)
        elif whole["answer_mask"][1:].any():
            cut_off += 1
    if not samples:
        raise DataError(
            f"no answers at all in {seen} chats: {cut_off} lost theirs to max_length={max_length} "
            f"on the {tokenizer.truncation_side} side, {seen - cut_off} have no trained assistant "
            "message: raise max_length or set tokenizer.truncation_side='left', and check the "
            "roles and weights of the messages"
        )
    return Encoded(samples, dropped=seen - len(samples), truncated=truncated)
