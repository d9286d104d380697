"""Finds where the header of an answer ends, and what of the text after it belongs to the answer.

The text between two contents of a chat, the glue, holds the end of one message and the beginning
of the next. The template itself says where to cut it: the chat up to a message is rendered with
and without the header of an answer, and compared with the whole chat. One pair of messages looks
like the next, so a cut is remembered with the glue, and long chats take linear time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from metafocus.data.fences import Group, Located, groups
from metafocus.data.rendering import Renderer
from metafocus.errors import DataError

_STANDIN = "stand-in"
_NUMBERS = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?|true|false|null")
_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?\Z")


def without_thought(header: str) -> str:
    """Return the header of an answer without the reasoning that some prompts open."""
    return _THOUGHT.sub("", header)


@dataclass(frozen=True)
class RenderedChat:
    """A chat in the form for the template, its rendering, and the stretches of its messages."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    found: Located
    groups: list[Group]

    @classmethod
    def of(
        cls, messages: list[dict[str, Any]], tools: list[Any] | None, found: Located
    ) -> RenderedChat:
        """Return the rendered chat of what was found."""
        return cls(messages, tools, found, groups(found))


class Tail(NamedTuple):
    """The text after the last text of a message.

    Attributes:
        own: its beginning, which is also there when the message is the last one.
        whole: whether the end of the message is the same when it is the last one.
        beyond: whether a control token right after `own` may be the stop token of the answer.
        as_at_use: whether the message is rendered as when it is the last one.
        lost: the kinds of texts that are only rendered when the message is the last one.
    """

    own: str
    whole: bool = True
    beyond: bool = True
    as_at_use: bool = True
    lost: tuple[str, ...] = ()


class Boundaries:
    """The cuts of a template's glue, found once and remembered."""

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._headers: dict[Any, str] = {}
        self._tails: dict[Any, tuple[str, Tail]] = {}
        self._prompts: dict[bool, str] = {}

    # The beginning of an answer --------------------------------------------------------------

    def header(self, chat: RenderedChat, n: int) -> str:
        """Return the text before the answer in stretch `n`, from the text before it on."""
        group, before = chat.groups[n], _before(chat, n)
        key = (_neighbours(chat, n - 1, n), before.rstrip())
        known = self._headers.get(key)
        if known is None or not before.startswith(known):
            known = self._headers[key] = self._header(chat, n, group.message, before)
        return known

    def _header(self, chat: RenderedChat, n: int, i: int, before: str) -> str:
        if i == 0:
            prompt = self._prompt(chat.tools)
            role = without_thought(prompt)
            if role and before.count(role) == 1:
                start = before.index(role)
                return before[:start] + _common(before[start:], prompt)
            return before
        last = chat.groups[n - 1].message if n else None
        earlier = chat.messages[:i]
        prompted = self._after(earlier, chat.tools, last, prompt=True)
        plain = self._after(earlier, chat.tools, last, prompt=False)
        if prompted is not None and prompted != plain:
            if before.startswith(prompted):
                return prompted
            common = _common(before, prompted)
            named = "name" in chat.messages[i]
            if not named and len(common) > len(_common(before, plain or "")):
                return common
        # The template ignores add_generation_prompt, or the header holds the name of the speaker.
        # Another answer shows what is the header.
        answer = {"role": "assistant", "content": _like(chat.messages[i].get("content"))}
        if "name" in chat.messages[i]:
            answer["name"] = chat.messages[i]["name"]
        trial = self._located([*earlier, answer], chat.tools)
        if trial is None or not trial.groups or trial.groups[-1].message != i:
            return before
        return _common(before, _before(trial, len(trial.groups) - 1))

    @cached_property
    def prompts(self) -> bool:
        """Whether the template ends with the header of an answer only where it is asked to."""
        answer = [{"role": role, "content": _STANDIN} for role in ("user", "assistant")]
        prompted = self._after(answer, None, 1, prompt=True)
        return prompted is None or prompted != self._after(answer, None, 1, prompt=False)

    def _prompt(self, tools: list[Any] | None) -> str:
        """Return the header of an answer after a question."""
        if bool(tools) not in self._prompts:
            question = [{"role": "user", "content": _STANDIN}]
            prompted = self._after(question, tools, 0, prompt=True)
            plain = self._after(question, tools, 0, prompt=False)
            same = prompted is not None and plain is not None and prompted.startswith(plain)
            self._prompts[bool(tools)] = prompted[len(plain) :] if same else ""  # pyright: ignore
        return self._prompts[bool(tools)]

    # The end of a message ----------------------------------------------------------------------

    def tail(self, chat: RenderedChat, n: int, header: str | None = None) -> Tail:
        """Return what of the text after stretch `n` belongs to its message.

        Args:
            chat: the rendered chat.
            n: the index of the stretch.
            header: of the answer, if the message is one.
        """
        group = chat.groups[n]
        after = _after(chat, n)
        if n + 1 == len(chat.groups) and group.message + 1 == len(chat.messages):
            return Tail(after)
        plain = after.lstrip()
        if chat.messages[group.message].get("tool_calls"):
            plain = _NUMBERS.sub("0", plain)
        made = _before(chat, n)[len(header or "") :]
        key = (_neighbours(chat, n - 1, n, n + 1), plain, made)
        rest, known = self._tails.get(key, ("", None))
        if known is None or not after.endswith(rest):
            known = self._tail(chat, n, after)
            rest = after[len(known.own) :]
            self._tails[key] = rest, known
        return known._replace(own=after[: len(after) - len(rest)])

    def _tail(self, chat: RenderedChat, n: int, after: str) -> Tail:
        group = chat.groups[n]
        i = group.message
        alone = self._located(chat.messages[: i + 1], chat.tools)
        if alone is None or not alone.groups or alone.groups[-1].message != i:
            return Tail("", whole=False)
        last = alone.groups[-1]
        finished = _after(alone, len(alone.groups) - 1)
        own = _common(finished, after)
        beyond = True
        follows = own == finished and i + 1 < len(chat.messages)
        if follows and chat.messages[i + 1]["role"] == "assistant":
            # A template without end-of-turn tokens continues with the header of the next answer.
            prompted = self._after(chat.messages[: i + 1], chat.tools, i, prompt=True)
            beyond = prompted is None or not prompted.startswith(finished)
        same = _before(alone, len(alone.groups) - 1) == _before(chat, n) and (
            alone.found.text[last.start : last.stop] == chat.found.text[group.start : group.stop]
        )
        lost = Counter(last.kinds) - Counter(group.kinds)
        return Tail(own, own == finished, beyond, same, tuple(sorted(lost)))

    # Renderings --------------------------------------------------------------------------------

    def _after(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[Any] | None,
        last: int | None,
        *,
        prompt: bool,
    ) -> str | None:
        """Return the rendered text after message `last`; None if another text comes last."""
        chat = self._located(messages, tools, prompt=prompt)
        if chat is None:
            return None
        if last is None:
            return None if chat.groups else chat.found.text
        if not chat.groups or chat.groups[-1].message != last:
            return None
        return _after(chat, len(chat.groups) - 1)

    def _located(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False
    ) -> RenderedChat | None:
        try:
            found = self._renderer.located(messages, tools, prompt=prompt)
        except DataError:
            return None
        return found and RenderedChat.of(list(messages), tools, found)


def _common(one: str, other: str) -> str:
    """Return the common beginning of two texts."""
    size = min(len(one), len(other))
    return one[: next((i for i in range(size) if one[i] != other[i]), size)]


def _before(chat: RenderedChat, n: int) -> str:
    return chat.found.text[chat.groups[n - 1].stop if n else 0 : chat.groups[n].start]


def _after(chat: RenderedChat, n: int) -> str:
    following = chat.groups[n + 1].start if n + 1 < len(chat.groups) else None
    return chat.found.text[chat.groups[n].stop : following]


def _like(content: Any) -> Any:
    return [{"type": "text", "text": _STANDIN}] if isinstance(content, list) else _STANDIN


def _neighbours(chat: RenderedChat, *places: int) -> tuple[Any, ...]:
    """Return what a template may see of some neighbouring messages, apart from their texts."""
    found: list[Any] = [bool(chat.tools)]
    previous: int | None = None
    for n in places:
        if not 0 <= n < len(chat.groups):
            found.append(None)
            continue
        group = chat.groups[n]
        message = chat.messages[group.message]
        step = None if previous is None else group.message - previous
        first = group.message == 0
        content = type(message.get("content"))
        found.append((message["role"], *sorted(message), content, group.kinds, step, first))
        previous = group.message
    return tuple(found)
