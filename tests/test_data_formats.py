"""Formats of records that are read as chats, and records that are no chats."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import normalizers

from metafocus.data import encode_chat, encode_chats, read_chats
from metafocus.data.formats import as_chat
from metafocus.data.plain import encode_plain
from metafocus.data.reading import read_dataset
from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.fixture
def small():
    return train_tokenizer(["hello there"], 270)


RECORDS = {
    "messages": ({"messages": CHAT, "id": 3}, {"messages": CHAT, "id": 3}),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "no", "weight": 0},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "yo"},
            ],
            "system": "be",
            "tools": "[]",
        },
        {
            "messages": [
                {"role": "system", "content": "be"},
                {"role": "user", "content": "hi"},
                {"role": "assistant", "weight": 0, "content": "no"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "yo"},
            ],
            "tools": "[]",
        },
    ),
    "conversations of roles": ({"conversations": CHAT}, {"messages": CHAT}),
    "prompt and completion": ({"prompt": "hi", "completion": "yo"}, {"messages": CHAT}),
    "prompt and response": ({"prompt": "hi", "response": "yo"}, {"messages": CHAT}),
    "prompt and completion as messages": (
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"messages": CHAT},
    ),
    "Alpaca": (
        {"instruction": "add", "input": "1 2", "output": "3"},
        {
            "messages": [
                {"role": "user", "content": "add\n\n1 2"},
                {"role": "assistant", "content": "3"},
            ]
        },
    ),
    "Alpaca with history": (
        {"instruction": "b", "input": "", "output": "y", "history": [["a", "x"]]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "x"},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "y"},
            ]
        },
    ),
    "text": ({"text": "abc"}, {"text": "abc"}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_formats(name):
    given, expected = RECORDS[name]
    assert as_chat(given) == expected
    assert as_chat(expected) == expected


BAD = {
    "no messages, only question: give each record messages": {"question": "a"},
    r"turn 0: from='robot' is unknown: use one of human, user, gpt": {
        "conversations": [{"from": "robot", "value": "a"}]
    },
    "turn 0: 'a' has no from and value": {"conversations": ["a"]},
    "conversations is 'a'": {"conversations": "a"},
    "turn 0: the function call is not JSON": {
        "conversations": [{"from": "function_call", "value": "f("}]
    },
    "prompt is 3: give a text or a list": {"prompt": 3, "completion": "a"},
    "history holds 'a': give pairs": {"instruction": "a", "output": "b", "history": ["a"]},
    "3 in the instruction or input is not text": {"instruction": 3, "output": "b"},
}


@pytest.mark.parametrize("text", BAD)
def test_bad_records(text):
    with pytest.raises(DataError, match=text):
        as_chat(BAD[text])


def test_all_formats_train_the_same_tokens(small):
    expected = encode_chat(CHAT, small)
    given = [given for given, made in RECORDS.values() if made.get("messages") == CHAT]
    assert len(given) == 5
    for sample in encode_chats(given, small, strict=True).samples:
        assert all(torch.equal(sample[name], expected[name]) for name in expected)


def test_an_array_in_a_json_file(tmp_path):
    path = tmp_path / "a.json"
    records = [{"messages": CHAT}, {"prompt": "hi", "completion": "yo"}]
    path.write_text("\ufeff \n" + json.dumps(records, indent=2), encoding="utf-8")
    assert read_chats(path) == [{"messages": CHAT}] * 2
    path.write_text(json.dumps([{"messages": CHAT}, 7]))
    with pytest.raises(DataError, match=r"a\.json, record 2: 7 is not an object"):
        read_chats(path)
    path.write_text("[{]")
    with pytest.raises(DataError, match=r"a\.json: not JSON .*an array of objects"):
        read_chats(path)


def test_records_that_are_malformed_may_be_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = [{"messages": [{"role": "bot", "content": ""}]}, {"from": 1}, {"messages": 3}]
    path.write_text("\n".join(json.dumps(one) for one in [{"messages": CHAT}, *bad]))
    skipped = []
    assert read_chats(path, skipped=skipped) == [{"messages": CHAT}]
    assert [reason.split(": ")[0] for reason in skipped] == [
        f"{path}, line {number}" for number in (2, 3, 4)
    ]
    path.write_text(json.dumps(bad[0]))
    with pytest.raises(DataError, match=r"line 1: message 0: role='bot'"):
        read_chats(path, skipped=[])


# --- text and tokens -----------------------------------------------------------------------------


def test_all_tokens_of_a_text_are_trained(small):
    sample = encode_plain({"text": "hello"}, small)
    assert small.decode(sample["input_ids"]) == "hello<|im_end|>"
    assert sample["answer_mask"].all()
    assert sample["turn_ids"].unique().tolist() == [1]
    closed = encode_plain({"text": "hello<|im_end|>"}, small)
    assert torch.equal(closed["input_ids"], sample["input_ids"])


def test_labels_say_what_is_trained():
    record = {
        "input_ids": [0, 5, 6, 7, 8, 0],
        "labels": [-100, -100, 6, 7, -100, -100],
        "attention_mask": [0, 1, 1, 1, 1, 0],
    }
    sample = encode_plain(record, None)  # pyright: ignore[reportArgumentType]
    assert {name: values.tolist() for name, values in sample.items()} == {
        "input_ids": [5, 6, 7, 8],
        "turn_ids": [0, 1, 1, 2],
        "answer_mask": [False, True, True, False],
    }
    whole = encode_plain({"input_ids": torch.tensor([5, 6])}, None)  # pyright: ignore
    assert whole["answer_mask"].all()


BAD_TOKENS = {
    "the label 7 stands at the token 6: a label is its own token": {
        "input_ids": [5, 6],
        "labels": [-100, 7],
    },
    "have 2, 1 and 2 entries": {"input_ids": [5, 6], "labels": [5]},
    "input_ids is '56': give a list": {"input_ids": "56"},
    "input_ids is empty": {"input_ids": []},
    "text is 3: give a string": {"text": 3},
    "text holds half of a surrogate pair": {"text": "a\ud800"},
}


@pytest.mark.parametrize("text", BAD_TOKENS)
def test_bad_tokens(small, text):
    with pytest.raises(DataError, match=text):
        encode_plain(BAD_TOKENS[text], small)


def test_a_text_without_a_token(small):
    small.eos_token = None
    small.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(DataError, match="makes no token of the text ' '"):
        encode_plain({"text": " "}, small)


def test_texts_and_chats_in_one_file(small):
    found = encode_chats([{"text": "hello"}, {"messages": CHAT}, {"text": ""}], small)
    assert [len(s["input_ids"]) for s in found.samples] == [2, 25]
    assert found.skipped == 1


# --- data sets -----------------------------------------------------------------------------------


def test_rows_of_a_dataset(small):
    datasets = pytest.importorskip("datasets")

    def chat(name, arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]

    records = [{"messages": chat("f", {"x": 1})}, {"messages": chat("g", {"y": 2})}]
    data = datasets.Dataset.from_list(records)
    expected = encode_chats(records, small).samples
    for rows in (data, list(data), data.to_iterable_dataset()):
        for sample, right in zip(encode_chats(rows, small).samples, expected, strict=True):
            assert torch.equal(sample["input_ids"], right["input_ids"])
    one = encode_chat(data[0]["messages"], small)
    assert torch.equal(one["input_ids"], expected[0]["input_ids"])


def test_nulls_of_arrow_in_the_tools_of_one_row(small):
    datasets = pytest.importorskip("datasets")

    def tool(name, **properties):
        schema = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": schema}}

    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    records = [
        {"messages": [CHAT[0], call], "tools": [tool("f", x={"type": "integer"})]},
        {"messages": CHAT, "tools": [tool("g", y={"type": "integer"})]},
    ]
    small.chat_template = "{{ tools | tojson }}" + small.chat_template
    row = datasets.Dataset.from_list(records)[0]
    found = encode_chat(row["messages"], small, tools=row["tools"])
    expected = encode_chat(**records[0], tokenizer=small)
    assert torch.equal(found["input_ids"], expected["input_ids"])


def test_a_null_argument_of_a_file_stays(small):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    messages = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    (sample,) = encode_chats([{"messages": messages}], small).samples
    assert '{"x": null}' in small.decode(sample["input_ids"])


@pytest.mark.parametrize("streaming", [False, True])
def test_directories_of_files_and_of_saved_data_sets(tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    records = [{"prompt": "hi", "completion": "yo"}] * 3
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    found = read_dataset(str(tmp_path), streaming=streaming, limit=2)
    assert found == {"train": [{"messages": CHAT}] * 2}
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(records).save_to_disk(saved)
    assert read_dataset(str(saved)) == {"train": [{"messages": CHAT}] * 3}
