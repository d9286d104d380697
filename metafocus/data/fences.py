"""Finds what a chat template does with each text of a chat.

Every text of the messages is put between two characters of a private-use plane, and the chat is
rendered with and without them. Where both renderings agree, the fences show which part of the
rendered text is which text of which message, and what the template drops or changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metafocus.data.messages import Message

# The supplementary private-use planes. Fonts with icons use a few characters of them.
_FIRST, _LAST = 0xF0000, 0x10FFFF
_PRIVATE = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_THOUGHT = re.compile(r"(\s*<think>)?(.*?)</think>(.*)", re.DOTALL)
# Keys of a message whose values are no text of the chat.
_PLUMBING = ("role", "weight", "train", "evidence", "tool_calls", "tool_call_id", "type", "id")
_REASONING = ("reasoning_content", "thinking", "reasoning")

_OPEN = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_CLOSE = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")


def is_marked(template: str) -> bool:
    """Return whether a template marks what the model generates."""
    return _OPEN.search(template) is not None


def with_marks(template: str, start: str, end: str) -> str:
    """Return the template with a character at both ends of what it marks as generated.

    A block around the character keeps the template's own control of white space.
    """
    template = _OPEN.sub(
        lambda m: f"{{%{m[1]} generation %}}{{% if true %}}{start}{{% endif {m[2]}%}}", template
    )
    return _CLOSE.sub(
        lambda m: f"{{%{m[1]} if true %}}{end}{{% endif %}}{{% endgeneration {m[2]}%}}", template
    )


@dataclass(frozen=True)
class Piece:
    """One text of a message.

    Attributes:
        message: the index of the message; -1 for a description of a tool.
        kind: "content", "reasoning", "name", "call" or "extra" (a key that a template may know).
        core: the text without white space at its ends.
        trail: the white space after it.
        escaped: whether the text may be written with the escapes of JSON or Python.
    """

    message: int
    kind: str
    core: str
    trail: str
    escaped: bool

    def is_rendered_as(self, text: str) -> bool:
        """Return whether a part of the rendered chat is this text."""
        return text == self.core or (self.escaped and text in _escapes(self.core))


@dataclass
class Located:
    """A rendered chat, and where its pieces stand in it.

    Attributes:
        text: the rendered chat.
        pieces: all texts of the chat.
        places: for each piece, its places as [start, stop) in the text.
        marks: what the template marks as generated, as [start, stop) in the text.
    """

    text: str
    pieces: list[Piece] = field(default_factory=list)
    places: list[list[tuple[int, int]]] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)


def _escapes(text: str) -> tuple[str, ...]:
    python = text.replace("\\", "\\\\").replace("'", "\\'")
    return (
        json.dumps(text, ensure_ascii=False)[1:-1],
        json.dumps(text)[1:-1],
        python.replace("\n", "\\n").replace("\r", "\\r"),
    )


class _Fencer:
    def __init__(self, first: int, empty: bool, calls: bool):
        self.first, self.empty, self.calls = first, empty, calls
        self.pieces: list[Piece] = []

    def fence(self, text: str, message: int, kind: str, escaped: bool = False) -> str:
        core = text.strip()
        if not core and not self.empty:
            return text
        number = self.first + 2 * len(self.pieces)
        lead = text[: len(text) - len(text.lstrip())]
        trail = text[len(lead) + len(core) :]
        self.pieces.append(Piece(message, kind, core, trail, escaped))
        return f"{lead}{chr(number)}{core}{chr(number + 1)}{trail}"

    def message(self, message: Message, i: int) -> dict[str, Any]:
        out = dict(message)
        for key in _REASONING:
            if isinstance(message.get(key), str) and message[key].strip():
                out[key] = self.fence(message[key], i, "reasoning")
                break
        if out.get("content"):
            out["content"] = self._content(message["content"], i, message["role"])
        elif out.get("content") == "" and not out.get("tool_calls"):
            out["content"] = self.fence("", i, "content")
        if self.calls:
            for key, value in message.items():
                if isinstance(value, str) and value.strip() and key not in out.keys() & _KNOWN:
                    out[key] = self.fence(value, i, "name" if key == "name" else "extra")
            if message.get("tool_calls"):
                out["tool_calls"] = [self._call(call, i) for call in message["tool_calls"]]
        return out

    def _content(self, content: str | list[Any], i: int, role: str) -> Any:
        if isinstance(content, list):
            return [
                {**part, "text": self.fence(part["text"], i, "content", role == "tool")}
                if isinstance(part, Mapping)
                else self.fence(part, i, "content", role == "tool")
                for part in content
            ]
        thought = _THOUGHT.fullmatch(content) if role == "assistant" else None
        if thought is None:
            return self.fence(content, i, "content", role == "tool")
        # Templates cut the content here, and drop or move the part before it.
        tag, reasoning, rest = thought[1] or "", thought[2], thought[3]
        if reasoning.strip():
            reasoning = self.fence(reasoning, i, "reasoning")
        if rest.strip():
            rest = self.fence(rest, i, "content")
        return f"{tag}{reasoning}</think>{rest}"

    def _call(self, call: Any, i: int) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(call["function"], i)}
        out = dict(call)
        if isinstance(call.get("name"), str):
            out["name"] = self.fence(call["name"], i, "call")
        if isinstance(call.get("arguments"), Mapping):
            out["arguments"] = self._values(call["arguments"], i)
        return out

    def _values(self, value: Any, i: int) -> Any:
        if isinstance(value, Mapping):
            return {k: self._values(v, i) for k, v in value.items()}
        if isinstance(value, list):
            return [self._values(v, i) for v in value]
        if isinstance(value, str) and value.strip():
            return self.fence(value, i, "call", escaped=True)
        return value

    def tool(self, tool: Any) -> Any:
        if not isinstance(tool, Mapping):
            return tool
        if isinstance(tool.get("function"), Mapping):
            return {**tool, "function": self.tool(tool["function"])}
        if not self.calls or not isinstance(tool.get("name"), str):
            return tool
        return {**tool, "name": self.fence(tool["name"], -1, "tool")}


_KNOWN = {*_PLUMBING, *_REASONING, "content"}

# A renderer takes messages, tools, and the characters that mark what is generated.
Render = Callable[[Sequence[Message], "list[Any] | None", "tuple[str, str]"], str]


def locate(
    render: Render, messages: Sequence[Message], tools: list[Any] | None, text: str
) -> Located | None:
    """Return where the texts of a chat stand in its rendering `text`.

    None says that the template renders the chat differently when its texts are fenced. Fewer
    texts are fenced then: first not the empty ones, then not the names and the calls either.
    """
    first = max(map(ord, _PRIVATE.findall(text)), default=_FIRST - 1) + 1
    for empty, calls in ((True, True), (False, True), (False, False)):
        fencer = _Fencer(first + 2, empty, calls)
        fenced = [fencer.message(message, i) for i, message in enumerate(messages)]
        schemas = [fencer.tool(tool) for tool in tools] if tools else tools
        if first + 2 + 2 * len(fencer.pieces) > _LAST:
            return None
        found = _parse(render(fenced, schemas, (chr(first), chr(first + 1))), first, fencer.pieces)
        if found.text == text:
            return found
    return None


def _parse(fenced: str, first: int, pieces: list[Piece]) -> Located:
    found = Located("", pieces, [[] for _ in pieces])
    plain: list[str] = []
    size = last = 0
    opened: dict[int, int] = {}
    for match in re.finditer(f"[{chr(first)}-{chr(_LAST)}]", fenced):
        plain.append(fenced[last : match.start()])
        size += match.start() - last
        last = match.end()
        number, end = divmod(ord(match[0]) - first, 2)
        if not end:
            opened[number] = size
        elif number in opened:
            start = opened.pop(number)
            (found.places[number - 1] if number else found.marks).append((start, size))
    plain.append(fenced[last:])
    found.text = "".join(plain)
    for piece, places in zip(pieces, found.places, strict=True):
        places[:] = [p for p in places if piece.is_rendered_as(found.text[p[0] : p[1]])]
    return found


@dataclass(frozen=True)
class Group:
    """The texts of one message, as one stretch [start, stop) of the rendered chat.

    Attributes:
        message: the index of the message.
        start: where the first text begins.
        stop: where the last text ends.
        kinds: the kinds of the texts in their order.
        trail: the white space that ends the last text.
    """

    message: int
    start: int
    stop: int
    kinds: tuple[str, ...]
    trail: str


def groups(found: Located) -> list[Group]:
    """Return the stretches of the messages in the order of the text.

    Where a template repeats a text, its first place counts.
    """
    placed = sorted(
        (*places[0], piece.message, piece.kind, piece.trail)
        for piece, places in zip(found.pieces, found.places, strict=True)
        if places and piece.kind not in ("name", "tool")
    )
    out: list[Group] = []
    for start, stop, message, kind, trail in placed:
        if out and out[-1].message == message:
            last = out[-1]
            kinds = (*last.kinds, kind)
            out[-1] = Group(message, last.start, max(last.stop, stop), kinds, trail)
        else:
            out.append(Group(message, start, stop, (kind,), trail))
    return out
