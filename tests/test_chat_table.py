"""Chat templates of other projects times shapes of chats, against an oracle of markers."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from chat_shapes import FAMILIES, SHAPES, TOOLS, WITH_TOOLS

from metafocus.data import encode_chat
from metafocus.errors import DataError

PAGE = Path(__file__).parent.parent / "docs" / "data.md"
# The version of trl whose templates the page counts.
_DOCUMENTED = "1.16.0"
GROUPS = {
    "calls": WITH_TOOLS,
    "roles that do not alternate": [
        "two answers in a row",
        "weight 0, then an answer",
        "two questions in a row",
        "starts with an answer",
    ],
}


def is_trained(message):
    return (
        message["role"] == "assistant"
        and message.get("weight") != 0
        and message.get("train") is not False
    )


def texts(message):
    """All texts that a message brings into a chat."""
    content = message.get("content") or ""
    whole = [part["text"] for part in content] if isinstance(content, list) else [content]
    # Templates write the reasoning in a content with their own white space around it.
    yield from (t for text in whole for t in text.replace("<think>", "</think>").split("</think>"))
    for key in ("reasoning_content", "thinking"):
        if is_trained(message):
            yield message.get(key) or ""
    if message["role"] != "tool":
        yield message.get("name") or ""
    for one in message.get("tool_calls") or []:
        arguments = one["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        yield one["function"]["name"]
        for key, value in arguments.items():
            if value is not None:
                yield key
                yield str(value)


def expected(family, tokenizer, messages, ids):
    """Which tokens are trained, from the markers in the text alone."""
    text = tokenizer.decode(ids)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tokens["input_ids"] == ids
    spans = family.answers(text)
    answers = [message for message in messages if message["role"] == "assistant"]
    assert len(spans) == len(answers), text
    controls = tokenizer.added_tokens_decoder
    found = []
    for token, (start, stop) in zip(ids, tokens["offset_mapping"], strict=True):
        # A control token may swallow white space of the answer after it.
        inside = (
            first < stop and start < last and not (token in controls and start < first)
            for (first, last), message in zip(spans, answers, strict=True)
            if is_trained(message)
        )
        found.append(any(inside))
    return found, text


def difference(family, tokenizer, shape):
    """None if the chat is refused, else what differs from the oracle."""
    messages = SHAPES[shape]
    try:
        sample = encode_chat(messages, tokenizer, tools=TOOLS if shape in WITH_TOOLS else None)
    except DataError as error:
        assert len(str(error)) > 40
        return None
    ids, mask = sample["input_ids"].tolist(), sample["answer_mask"].tolist()
    right, text = expected(family, tokenizer, messages, ids)
    wrong = [t for t in (t for m in messages for t in texts(m)) if t.strip() not in text]
    for name, these, those in (("trained", mask, right), ("not trained", right, mask)):
        odd = [i for i, a, b in zip(ids, these, those, strict=True) if a and not b]
        if odd:
            wrong.append(f"{name}: {tokenizer.decode(odd)!r}")
    return wrong


def table_line(name, refused):
    """The line of docs/data.md about a template."""
    words = list(refused)
    for label, group in GROUPS.items():
        if set(group) <= set(words):
            words = [*(word for word in words if word not in group), f"{label} ({len(group)})"]
    return (
        f"| {name.replace('@', ', ')} | {len(SHAPES) - len(refused)} | {', '.join(words) or '-'} |"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_and_contents(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer(name)
    found = {shape: difference(family, tokenizer, shape) for shape in SHAPES}
    assert {shape: wrong for shape, wrong in found.items() if wrong} == {}
    # The plainest chat works with every template.
    assert found["one pair"] == []
    if version("trl") == _DOCUMENTED:
        line = table_line(name, [shape for shape, wrong in found.items() if wrong is None])
        assert line in PAGE.read_text("utf-8"), f"docs/data.md must have the line {line}"


def test_there_are_enough_templates_and_shapes():
    assert len({name.removesuffix("_training") for name in FAMILIES}) >= 25
    assert len(SHAPES) >= 20
