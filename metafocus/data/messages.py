"""Checks messages: one error for each mistake that would make every template wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metafocus.checks import is_whole
from metafocus.errors import DataError

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def is_trained(message: Message) -> bool:
    """Return whether a message is an answer to learn."""
    return (
        message["role"] == "assistant"
        and message.get("weight") != 0
        and message.get("train") is not False
    )


def last_answer(messages: Sequence[Message]) -> list[Message]:
    """Return the chat up to its last trained answer, of which only this answer is trained."""
    trained = [i for i, message in enumerate(messages) if is_trained(message)]
    return up_to(messages, trained[-1]) if trained else list(messages)


def up_to(messages: Sequence[Message], last: int) -> list[Message]:
    """Return the chat up to message `last`, of which no earlier answer is trained."""
    earlier = [{**m, "weight": 0} if is_trained(m) else m for m in messages[:last]]
    return [*earlier, messages[last]]


def without_nulls(value: Any) -> Any:
    """Return a value of JSON without the keys that hold null."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def from_arrow(messages: Any) -> bool:
    """Return whether messages are those of a row of Arrow, whose structs all have the same keys.

    There a key that only other rows have is null, in the arguments of calls, too.
    """
    return any(
        isinstance(m, Mapping) and "tool_calls" in m and m["tool_calls"] is None for m in messages
    )


def check_messages(messages: Any) -> None:
    """Raise for messages that no template can render as intended.

    Raises:
        DataError: if messages is not a list or is empty, if a role is unknown, if content is
            missing, or if a weight or evidence is wrong.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise DataError(f"messages is {messages!r:.80}: pass a list of message dicts")
    if not messages:
        raise DataError("messages is empty: pass at least one message")
    for i, message in enumerate(messages):
        _check_message(message, f"message {i}: ")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}{message!r:.80} is not a dict with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}role={role!r} is unknown: use one of {', '.join(ROLES)}")
    if content is None and not (role == "assistant" and message.get("tool_calls")):
        raise DataError(
            f"{where}the {role} message has no content: give a string "
            "(only an assistant message with tool_calls may go without)"
        )
    if content is not None and not isinstance(content, (str, list)):
        raise DataError(f"{where}content={content!r:.80} is neither a string nor a list of parts")
    if isinstance(content, str):
        _check_text(content, where)
    for part in content if isinstance(content, list) else []:
        _check_part(part, where)
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise DataError(f"{where}tool_calls={calls!r:.80} is not a list of calls")
    train = message.get("train")
    if train is not None and (role != "assistant" or not isinstance(train, bool)):
        raise DataError(
            f"{where}train={train!r} on a {role} message: train is true or false, and only on "
            "assistant messages"
        )
    weight = message.get("weight")
    if weight is not None and (role != "assistant" or weight not in (0, 1)):
        raise DataError(
            f"{where}weight={weight!r} on a {role} message: weight is 0 (not trained) or 1, and "
            "only on assistant messages"
        )
    evidence = message.get("evidence")
    if evidence is not None:
        _check_evidence(evidence, role, content, where)


def _check_part(part: Any, where: str) -> None:
    text = part.get("text") if isinstance(part, Mapping) else part
    kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
    if kind != "text" or not isinstance(text, str):
        raise DataError(
            f"{where}the part {part!r:.80} of the content is not text: remove images and other "
            "media, give {'type': 'text', 'text': ...}"
        )


def _check_text(text: str, where: str) -> None:
    # JSON can express half of a UTF-16 surrogate pair, which no tokenizer accepts.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}character {error.start} of the content, {text[error.start]!a}, is half of a "
            "surrogate pair: the text was cut between two code units of UTF-16"
        ) from error


def _check_evidence(evidence: Any, role: str, content: Any, where: str) -> None:
    if role == "assistant" or not isinstance(content, str):
        raise DataError(
            f"{where}evidence belongs to a non-assistant message whose content is a string"
        )
    for span in evidence if isinstance(evidence, (list, tuple)) else [evidence]:
        good = (
            isinstance(span, (list, tuple))
            and len(span) == 2
            and all(is_whole(edge) for edge in span)
            and 0 <= span[0] < span[1] <= len(content)
        )
        if not good:
            raise DataError(
                f"{where}evidence span {span!r} is not [start, end] with 0 <= start < end <= "
                f"{len(content)}, the number of characters of the content"
            )
