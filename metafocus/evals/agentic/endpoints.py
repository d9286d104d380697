"""Endpoints: functions that turn a chat into a reply."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from metafocus.errors import DataError, MetafocusError

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
    state does not change.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        temperature: 0 for greedy replies.
        top_p: the share of probability to sample from.
        new_tokens: the largest number of tokens of a reply.

    Raises:
        DataError: if a setting is out of its range, or if there is no chat template.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    temperature: float = 0.7
    top_p: float = 1.0
    new_tokens: int = 1024

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.new_tokens < 1:
            raise DataError(
                f"temperature={self.temperature}, top_p={self.top_p}, "
                f"new_tokens={self.new_tokens}: needs temperature >= 0, 0 < top_p <= 1 and "
                "new_tokens >= 1"
            )
        if self.tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template: set tokenizer.chat_template")

    def __call__(self, messages: Sequence[Message], *, seed: int) -> str:
        """Return a reply.

        Raises:
            TooLong: if the chat fills all positions of the model.
        """
        from metafocus.evals.run import sample

        ids: Any = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
        )
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = self.new_tokens if most is None else min(self.new_tokens, most - len(ids))
        if room < 1:
            raise TooLong(f"the chat has {len(ids)} tokens, the model {most} positions")
        return sample(
            self.model, self.tokenizer, ids, room, self.temperature, top_p=self.top_p, seed=seed
        )


@dataclass(frozen=True)
class HTTPEndpoint:
    """A server with OpenAI's chat completions API, such as vLLM or llama.cpp.

    Args:
        url: the address with the version, such as "http://localhost:8000/v1".
        model: the name of the model on the server.
        temperature: the temperature of sampling.
        new_tokens: the largest number of tokens of a reply.
        key: sent as a bearer token; it is not printed.
        timeout: the number of seconds to wait for a reply.
    """

    url: str
    model: str
    temperature: float = 0.7
    new_tokens: int = 1024
    key: str | None = field(default=None, repr=False)
    timeout: float = 600.0

    def __call__(self, messages: Sequence[Message], *, seed: int) -> str:
        """Return a reply; the seed is sent to the server.

        Raises:
            DataError: if the server cannot be reached, refuses, or returns an unknown format.
        """
        address = f"{self.url.rstrip('/')}/chat/completions"
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.new_tokens,
            "seed": seed % 2**31,
        }
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                found = json.load(response)
            content = found["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode("utf-8", "replace")
            raise DataError(f"url={address!r} answers {error.code}: {said}") from error
        except OSError as error:
            raise DataError(f"url={address!r} cannot be reached: {error}") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"url={address!r} does not answer as chat completions do") from error
        return content or ""
