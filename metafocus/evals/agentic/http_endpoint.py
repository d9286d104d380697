"""A server with OpenAI's chat completions API as an endpoint, with retries."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from metafocus.errors import DataError
from metafocus.evals.agentic.endpoints import Message, TooLong
from metafocus.evals.thinking import CLOSE, OPEN

# A server that is starting, overloaded or restarted; other refusals are the same the next time.
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST = 60.0  # seconds between two tries
# What vLLM, llama.cpp, TGI, SGLang and OpenAI say when a chat is too long.
_TOO_LONG = re.compile(
    r"context[ _](?:length|window|size)|maximum context|exceeds? .{0,40}context|"
    r"prompt is too long|too many (?:input )?tokens|tokens? .{0,40}(?:must be <=|exceeds?) ",
    re.IGNORECASE,
)


class _Again(Exception):
    """A request that may succeed later: the reason, and the seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class HTTPEndpoint:
    """A server with OpenAI's chat completions API, such as vLLM or llama.cpp.

    A request is repeated if the server is busy, cannot be reached, or sends no JSON. Before each
    repetition the wait doubles, up to a minute. Calls of tools that the server has parsed, and
    reasoning that it has separated, become part of the text again.

    Args:
        url: the address with the version, such as "http://localhost:8000/v1".
        model: the name of the model on the server.
        temperature: the temperature of sampling.
        new_tokens: the largest number of tokens of a reply.
        key: sent as a bearer token; it is not printed.
        timeout: the number of seconds to wait for a reply.
        top_p: the share of probability to sample from.
        retries: how often a request is repeated.
        wait: the seconds before the first repetition.
        extra: more fields of the request, such as `chat_template_kwargs` of vLLM.
    """

    url: str
    model: str
    temperature: float = 0.7
    new_tokens: int = 1024
    key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    top_p: float = 1.0
    retries: int = 5
    wait: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self, messages: Sequence[Message], *, seed: int, new_tokens: int | None = None
    ) -> str:
        """Return a reply; the seed is sent to the server.

        Args:
            messages: the chat.
            seed: the seed of this reply.
            new_tokens: replaces the setting of the endpoint.

        Raises:
            TooLong: if the server says that the chat is too long for the model.
            DataError: if the server cannot be reached, refuses, or returns an unknown format.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.new_tokens if new_tokens is None else new_tokens,
            "seed": seed % 2**31,
            **({} if self.top_p == 1 else {"top_p": self.top_p}),
            **self.extra,
        }
        found = _repeated(lambda: self._post(body), self.retries, self.wait)
        try:
            return _text(found["choices"][0]["message"])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DataError(
                f"url={self._address!r} does not answer as chat completions do"
            ) from error

    @property
    def _address(self) -> str:
        return f"{self.url.rstrip('/')}/chat/completions"

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address, json.dumps(body).encode(), headers)
        if self.key is not None:
            # The key must not follow a redirection to another server.
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            told = ""
            with error, contextlib.suppress(OSError, http.client.HTTPException):
                told = error.read(2000).decode("utf-8", "replace")
            if error.code in (400, 413, 422) and _TOO_LONG.search(told):
                raise TooLong(f"url={self._address!r}: {told:.300}") from error
            reason = f"url={self._address!r} answers {error.code}: {told:.500}"
            if error.code in _AGAIN:
                raise _Again(reason, _seconds(error.headers.get("Retry-After"))) from error
            raise DataError(reason) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Again(f"url={self._address!r} cannot be reached: {error}") from error
        except ValueError as error:
            raise _Again(
                f"url={self._address!r} does not answer as chat completions do: {error}"
            ) from error


def _repeated(ask: Callable[[], Any], retries: int, wait: float) -> Any:
    for left in range(retries, -1, -1):
        try:
            return ask()
        except _Again as error:
            if not left:
                tries = f" ({retries + 1} tries)" if retries else ""
                raise DataError(f"{error}{tries}") from error
            time.sleep(min(max(wait, error.wait), _LONGEST))
            wait *= 2
    raise AssertionError("the last try raises")


def _seconds(word: str | None) -> float:
    return float(word) if word is not None and word.isdecimal() else 0.0


def _text(message: dict[str, Any]) -> str:
    """Return the reply as the model wrote it: with its reasoning and its first call of a tool."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    parts = [f"{OPEN}{thought}{CLOSE}"] if isinstance(thought, str) else []
    calls = message.get("tool_calls") or []
    # Some servers leave the content out of a message that calls a tool.
    parts.append((message.get("content") if calls else message["content"]) or "")
    for call in calls[:1]:
        made = call["function"]
        value = {"name": made["name"], "arguments": made["arguments"]}
        parts.append(f"<tool_call>{json.dumps(value)}</tool_call>")
    return "".join(parts)
