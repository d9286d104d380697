"""Turns records of the usual formats into chats: ShareGPT, prompt and completion, Alpaca."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from metafocus.errors import DataError

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_KEPT = ("weight", "train", "name", "evidence")
_HELP = (
    "give each record messages (role and content), conversations (from and value), prompt and "
    "completion, instruction and output, text, or input_ids and labels"
)


def as_chat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with `messages`; records with `text` or `input_ids` stay as they are.

    | keys | become |
    |---|---|
    | `conversations`: `from`, `value` | messages of the roles that the speakers stand for |
    | `prompt`, `completion` (or `response`) | a question and an answer, or two lists of messages |
    | `instruction`, `input`, `output` | a question of both, and an answer; `history` before them |

    A column `system` becomes the first message. Other columns are kept.

    Raises:
        DataError: if the record is of none of these formats.

    Example:
        >>> as_chat({"conversations": [{"from": "human", "value": "hi"}]})["messages"]
        [{'role': 'user', 'content': 'hi'}]
    """
    if "messages" in record:
        return dict(record)
    if "conversations" in record:
        used, messages = ("conversations", "system"), _conversation(record["conversations"])
    elif "prompt" in record and ("completion" in record or "response" in record):
        answer = "completion" if "completion" in record else "response"
        used = ("prompt", answer, "system")
        messages = [
            *_side("prompt", record["prompt"], "user"),
            *_side(answer, record[answer], "assistant"),
        ]
    elif "instruction" in record and "output" in record:
        used, messages = ("instruction", "input", "output", "history", "system"), _alpaca(record)
    elif "text" in record or "input_ids" in record:
        return dict(record)
    else:
        if record.keys() >= {"role", "content"}:
            raise DataError('a single message: a record is a whole chat, {"messages": [...]}')
        names = ", ".join(map(str, record)) or "nothing"
        raise DataError(f"no messages, only {names}: {_HELP}")
    if record.get("system"):
        messages = [{"role": "system", "content": record["system"]}, *messages]
    return {"messages": messages, **{k: v for k, v in record.items() if k not in used}}


def _conversation(turns: Any) -> list[dict[str, Any]]:
    if isinstance(turns, str | Mapping) or not isinstance(turns, Sequence):
        raise DataError(f"conversations is {turns!r:.80}: pass a list of turns with from and value")
    return [_turn(turn, f"turn {i}: ") for i, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if isinstance(turn, Mapping) and "role" in turn:
        return dict(turn)
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise DataError(f"{where}{turn!r:.80} has no from and value")
    speaker = turn["from"]
    if speaker not in _SPEAKERS:
        raise DataError(f"{where}from={speaker!r} is unknown: use one of {', '.join(_SPEAKERS)}")
    message = {"role": _SPEAKERS[speaker], **{k: turn[k] for k in _KEPT if k in turn}}
    if speaker != "function_call":
        return {**message, "content": turn["value"]}
    try:
        calls = json.loads(turn["value"])
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}the function call is not JSON ({error})") from error
    calls = calls if isinstance(calls, list) else [calls]
    functions = [{"type": "function", "function": call} for call in calls]
    return {**message, "content": "", "tool_calls": functions}


def _side(name: str, value: Any, role: str) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise DataError(f"{name} is {value!r:.80}: give a text or a list of messages")
    return [{"role": role, "content": value}]


def _alpaca(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    pairs = []
    for pair in record.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"history holds {pair!r:.80}: give pairs of a question and an answer")
        pairs.append(pair)
    parts = [record["instruction"], record.get("input")]
    odd = next((part for part in parts if part is not None and not isinstance(part, str)), None)
    if odd is not None:
        raise DataError(f"{odd!r:.80} in the instruction or input is not text")
    pairs.append(("\n\n".join(part for part in parts if part), record["output"]))
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]
