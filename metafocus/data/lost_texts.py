"""Checks that a template renders every text of a chat, and says what to do where it does not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metafocus.data.boundaries import RenderedChat
from metafocus.data.messages import Message, is_trained


def lost(chat: RenderedChat, given: Sequence[Message]) -> str | None:
    """Return what the template does not render as it stands in the messages; None if all is there.

    The reasoning of an answer that is not trained may be missing: templates drop it on purpose
    from earlier turns.
    """
    for piece, places in zip(chat.found.pieces, chat.found.places, strict=True):
        if piece.message < 0:
            if not places:
                return f"the function {piece.core!r:.60} of the tools is not rendered"
            continue
        message = given[piece.message]
        text = (
            f"the {piece.kind} of message {piece.message} ({message['role']}), {piece.core!r:.60}"
        )
        assistant = message["role"] == "assistant"
        if piece.kind == "name" and message["role"] == "tool":
            if piece.core not in chat.found.text:
                return f"{text}, is not rendered"
        elif piece.kind in ("content", "name", "call") and not places:
            return f"{text}, is dropped or changed"
        elif piece.kind == "content" and assistant and len(places) > 1:
            return f"{text}, is rendered {len(places)} times"
    stretches = [group.message for group in chat.groups]
    for i, message in enumerate(given):
        role = message["role"]
        fenced = any(p.message == i and p.kind in ("content", "call") for p in chat.found.pieces)
        if role == "assistant" and stretches.count(i) != 1:
            return f"message {i} (assistant) is empty, or its texts are mixed with those of others"
        if message.get("tool_calls") or not fenced:
            missing = next((v for v in _plain_values(message) if v not in chat.found.text), None)
            if missing is not None:
                return f"{missing!r:.60} of message {i} ({role}) is not rendered"
    answers = [i for i in stretches if given[i]["role"] == "assistant"]
    return "it changes the order of the assistant messages" if answers != sorted(answers) else None


def lost_reasoning(chat: RenderedChat, given: Sequence[Message]) -> int | None:
    """Return the first trained message whose reasoning is not rendered, or None."""
    for piece, places in zip(chat.found.pieces, chat.found.places, strict=True):
        if piece.kind == "reasoning" and not places and is_trained(given[piece.message]):
            return piece.message
    return None


def _plain_values(message: Message) -> Iterator[str]:
    """Yield the names, keys and numbers of tool calls, as every template writes them."""
    for call in message.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if isinstance(function, Mapping):
            if isinstance(function.get("name"), str):
                yield function["name"]
            yield from _leaves(function.get("arguments"))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return
    if isinstance(value, Mapping):
        yield from (key for key in value if isinstance(key, str))
        for inner in value.values():
            yield from _numbers(inner)


def _numbers(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from (key for key in value if isinstance(key, str))
    if isinstance(value, Mapping | list):
        inner: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
        for one in inner:
            yield from _numbers(one)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


@cache
def training_template(template: str) -> Path | None:
    """Return the file of the installed `trl` that replaces a template for training, or None."""
    spec = find_spec("trl")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place, "chat_templates").glob("*.jinja")):
            better = path.with_name(f"{path.stem}_training.jinja")
            if better.is_file() and path.read_text(encoding="utf-8") == template:
                return better
    return None
