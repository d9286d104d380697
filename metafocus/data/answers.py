"""Finds the answers of a rendered chat in its tokens: content and stop token, without header."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from metafocus.data.boundaries import Boundaries, RenderedChat, Tail, without_thought
from metafocus.data.fences import Group, is_marked
from metafocus.data.messages import Message, is_trained
from metafocus.data.rendering import Renderer
from metafocus.data.token_offsets import Tokens, control_tokens
from metafocus.errors import DataError

_CLOSING = re.compile(r"</([^<>\s]+)>")


@dataclass(frozen=True)
class Answer:
    """An assistant message in tokens.

    Attributes:
        message: the index of the message.
        start: the first token after the header.
        stop: the first token after the stop token.
        end: the first token of the next message.
        trained: the tokens that are trained, if the message is.
        as_at_use: whether the message is rendered as when it is the last one.
    """

    message: int
    start: int
    stop: int
    end: int
    trained: tuple[int, ...]
    as_at_use: bool


class Finder:
    """Finds answers; it remembers what it learned about the template."""

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._boundaries = Boundaries(renderer)

    @cached_property
    def controls(self) -> frozenset[int]:
        """The ids of special and added tokens."""
        return control_tokens(self._renderer.tokenizer)

    def answers(self, chat: RenderedChat, tokens: Tokens, given: Sequence[Message]) -> list[Answer]:
        """Return the answers of a chat in their order.

        Raises:
            DataError: if an answer cannot be located, or if its content would not be trained.
        """
        found: list[Answer] = []
        marked = is_marked(self._renderer.template(chat.tools))
        headers = {}
        for n, group in enumerate(chat.groups):
            if chat.messages[group.message]["role"] == "assistant":
                headers[n] = self._boundaries.header(chat, n)
        marks = _of_answers(chat, headers) if marked else {}
        for n, header in headers.items():
            group = chat.groups[n]
            tail = self._boundaries.tail(chat, n, header)
            edge = chat.groups[n - 1].stop if n else 0
            start = tokens.beginning(edge + len(header))
            stop = self._stop(chat, n, tail, tokens, start)
            if marked:
                # The reasoning that a prompt opens belongs to what the template marks.
                start = tokens.beginning(edge + len(without_thought(header)))
            answer = self._answer(group, tail, tokens, start, stop, marks.get(n))
            if is_trained(given[group.message]):
                _check(chat, group, tail, answer, tokens, marked)
            found.append(answer)
        return found

    def ends(self, chat: RenderedChat, tokens: Tokens, answers: Sequence[Answer]) -> list[int]:
        """Return the number of tokens up to the end of each message.

        Raises:
            DataError: if the template joins messages, so that their boundary cannot be found.
        """
        known = {answer.message: answer.end for answer in answers}
        order = [group.message for group in chat.groups]
        if order != list(range(len(chat.messages))):
            raise DataError(
                "the template drops, joins or moves messages, so they have no boundaries of their "
                "own: pass merge_context=True"
            )
        ends = []
        for n, group in enumerate(chat.groups):
            tail = self._boundaries.tail(chat, n)
            if group.message not in known and not tail.whole:
                raise DataError(
                    f"message {group.message} cannot be located, because the template renders its "
                    "end differently when another message follows: pass merge_context=True"
                )
            ends.append(known.get(group.message, tokens.before(group.stop + len(tail.own))))
        ends[-1] = len(tokens.ids)
        return ends

    def _answer(
        self,
        group: Group,
        tail: Tail,
        tokens: Tokens,
        start: int,
        stop: int,
        marks: list[tuple[int, int]] | None,
    ) -> Answer:
        end = _after_space(tokens, stop, tokens.before(group.stop + len(tail.own)))
        if marks is None:
            return Answer(
                group.message, start, stop, end, tuple(range(start, stop)), tail.as_at_use
            )
        trained: set[int] = set()
        for first, last in marks:
            # Some templates mark the header of the answer, too.
            begin = max(tokens.beginning(first), start)
            trained.update(range(begin, tokens.starting_before(last)))
        if trained:
            closing = max((i for i in trained if tokens.is_control(i)), default=len(tokens.ids))
            trained = {i for i in trained if i <= closing or not _all_space(tokens, closing + 1, i)}
            if tokens.is_control(stop - 1):
                trained.add(stop - 1)
            start, stop = min(trained), max(stop, max(trained) + 1)
        end = max(end, stop)
        return Answer(group.message, start, stop, end, tuple(sorted(trained)), tail.as_at_use)

    # The stop token ----------------------------------------------------------------------------

    def _stop(self, chat: RenderedChat, n: int, tail: Tail, tokens: Tokens, start: int) -> int:
        """Return the first token after the stop token of an answer, or after its last text."""
        group = chat.groups[n]
        first = max(tokens.before(group.stop), start)
        own = max(tokens.before(group.stop + len(tail.own)), first)
        closes = self._closers(chat, group, tokens)
        ends = [i for i in range(first, own) if tokens.is_control(i) and not closes(i)]
        if ends:
            eos = self._renderer.tokenizer.eos_token_id
            last = -1 if self._boundaries.prompts else 0
            return next((i for i in ends if tokens.ids[i] == eos), ends[last]) + 1
        size = len(tokens.ids)
        if own < size and tail.beyond and tokens.is_control(own) and not closes(own):
            return own + 1
        if tail.own.startswith(group.trail):
            first = max(first, tokens.starting_before(group.stop + len(group.trail)))
        while own > first and tokens.is_space(own - 1):
            own -= 1
        return own

    def _closers(self, chat: RenderedChat, group: Group, tokens: Tokens) -> Any:
        """Return what tells a closing tag of the message, or the begin of a text, from a stop."""
        tokenizer: Any = self._renderer.tokenizer
        begin = {tokenizer.bos_token_id} - {tokenizer.eos_token_id}
        body = chat.found.text[max(group.start - 200, 0) : group.stop]

        def closes(i: int) -> bool:
            if tokens.ids[i] in begin:
                return True
            tag = _CLOSING.fullmatch(tokens.name(i).strip())
            return tag is not None and f"<{tag[1]}>" in body

        return closes


def _of_answers(chat: RenderedChat, headers: dict[int, str]) -> dict[int, list[tuple[int, int]]]:
    """Return the generation marks of each answer, by its stretch."""
    found: dict[int, list[tuple[int, int]]] = {n: [] for n in headers}
    order = list(headers)
    at = 0
    for first, last in chat.found.marks:
        if first == last:
            continue
        # An answer begins after its header; what is marked before that belongs to the last one.
        while at + 1 < len(order):
            following = order[at + 1]
            edge = chat.groups[following - 1].stop + len(headers[following])
            if first < edge and last <= chat.groups[following].start:
                break
            at += 1
        n = order[at] if order else None
        if n is None or (n and first < chat.groups[n - 1].stop):
            raise DataError(
                f"the template marks {chat.found.text[first:last]!r:.60} as generated, which is in "
                "no assistant message: correct its {% generation %}"
            )
        found[n].append((first, last))
    return found


def _check(
    chat: RenderedChat, group: Group, tail: Tail, answer: Answer, tokens: Tokens, marked: bool
) -> None:
    if tail.lost:
        raise DataError(
            f"the chat template rewrites history: it drops the {' and the '.join(tail.lost)} of "
            f"message {group.message} when other messages follow. Pass turns='each' to "
            "encode_chats (--turns each), so that each answer is the last message of a chat of its "
            "own, or turns='last'"
        )
    for piece, places in zip(chat.found.pieces, chat.found.places, strict=True):
        if marked and piece.message == group.message and piece.kind == "content":
            start, stop = places[0]
            content = range(tokens.beginning(start), tokens.starting_before(stop))
            if not set(content) <= set(answer.trained):
                raise DataError(
                    f"the template's generation marks do not cover message {group.message}: "
                    "correct its {% generation %}, or give the message weight 0"
                )


def _after_space(tokens: Tokens, start: int, stop: int) -> int:
    while start < stop and tokens.is_space(start):
        start += 1
    return start


def _all_space(tokens: Tokens, start: int, last: int) -> bool:
    return all(tokens.is_space(i) for i in range(start, last + 1))
