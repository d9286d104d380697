"""Endpoints: functions that turn a chat into a reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from metafocus.checks import whole
from metafocus.errors import DataError, MetafocusError
from metafocus.evals.positions import positions
from metafocus.evals.prompts import answer_text, chat_text, encode
from metafocus.evals.run import closed_thoughts, end_tokens, sample_tokens, think_end
from metafocus.evals.thinking import CLOSE, OPEN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": ...}`."""


class TooLong(MetafocusError):
    """A chat that is too long for a reply of the model."""


class Endpoint(Protocol):
    """Turns a chat into a reply. If possible, the same chat and seed give the same reply."""

    def __call__(self, messages: Sequence[Message], *, seed: int) -> str:
        """Return the assistant's next message."""
        ...


@dataclass(frozen=True)
class LocalEndpoint:
    """A Hugging Face model with its chat template, sampled one reply at a time.

    These settings replace those of the checkpoint. A seed determines a reply, and the global random
    state does not change. Without a chat template, chats are written in a plain form.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        temperature: 0 for greedy replies.
        top_p: the share of probability to sample from.
        new_tokens: the largest number of tokens of a reply, without its reasoning.
        thinking: the largest number of tokens of reasoning before a reply; 0 for none.
        max_positions: the positions of the model, if its configuration does not say them.

    Raises:
        DataError: if a setting is out of its range, or if a model without a token `</think>` should
            think.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    temperature: float = 0.7
    top_p: float = 1.0
    new_tokens: int = 1024
    thinking: int = 0
    max_positions: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.new_tokens < 1:
            raise DataError(
                f"temperature={self.temperature}, top_p={self.top_p}, "
                f"new_tokens={self.new_tokens}: needs temperature >= 0, 0 < top_p <= 1 and "
                "new_tokens >= 1"
            )
        whole("thinking", self.thinking, error=DataError)
        if self.thinking:
            think_end(self.tokenizer)

    def __call__(self, messages: Sequence[Message], *, seed: int) -> str:
        """Return a reply.

        Raises:
            TooLong: if the chat fills all positions of the model.
        """
        text = chat_text(messages, self.tokenizer, thinking=self.thinking > 0)
        ids = encode(text, self.tokenizer)
        most = self.max_positions or positions(self.model.config)
        tail = closed_thoughts(self.tokenizer) if self.thinking else []
        room = self.new_tokens
        if most is not None:
            room = min(room, most - len(ids) - self.thinking - len(tail))
        if room < 1:
            raise TooLong(f"the chat has {len(ids)} tokens, the model {most} positions")
        ends = end_tokens(self.model, self.tokenizer)
        thought = ""
        if self.thinking:
            stop = [*ends, think_end(self.tokenizer)]
            found = self._sample(ids, self.thinking, stop, seed)
            thought = f"{OPEN}{answer_text(found, self.tokenizer)}{CLOSE}"
            ids = [*ids, *found, *tail]
        return thought + answer_text(self._sample(ids, room, ends, seed), self.tokenizer)

    def _sample(self, ids: list[int], new: int, ends: list[int], seed: int) -> list[int]:
        return sample_tokens(
            self.model, ids, new, self.temperature, ends=ends, top_p=self.top_p, seed=seed
        )
