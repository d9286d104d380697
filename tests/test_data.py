from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metafocus.data import Collator, collate, encode_chat, encode_chats, pack, read_chats
from metafocus.data.batches import _first_fit
from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["hello there"], 270)


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ----------------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_lines(tmp_path, suffix):
    records = [
        {"messages": CHAT, "id": 7},
        {"messages": [{"role": "user", "content": "\u2028 é"}], "tools": [{"name": "f"}]},
    ]
    first, second = (json.dumps(record, ensure_ascii=False) for record in records)
    path = write(tmp_path / f"a{suffix}", f"\ufeff{first}\n\n  \r\n{second}")
    assert read_chats(path) == records
    assert read_chats(str(path)) == records


def test_parquet_gives_the_same_records_as_json(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    records = [
        {"messages": CHAT, "tools": [{"name": "f"}]},
        {
            "messages": [
                {"role": "user", "content": "abc", "evidence": [[0, 2]]},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "1", "name": "f"},
                {"role": "assistant", "content": "b", "weight": 0},
            ],
        },
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    assert read_chats(tmp_path / "a.parquet") == records


def test_tools_may_be_json_text(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": CHAT, "tools": '[{"name": "f"}]'}))
    assert read_chats(path)[0]["tools"] == [{"name": "f"}]


GOOD = json.dumps({"messages": CHAT})
BAD_LINES = {
    "line 3: not JSON": f'{GOOD}\n\n{{"messages": [',
    "line 1: not JSON .*one complete JSON object per line": b'{"messages": "\xff"}',
    r"line 2: \[1\] is not an object": f"{GOOD}\n[1]",
    "line 1: no messages, only prompt, id": '{"prompt": "a", "id": 1}',
    "line 1: no messages, only nothing": "{}",
    "line 2: messages is empty": f'{GOOD}\n{{"messages": []}}',
    "line 1: messages is None": '{"messages": null}',
    "line 1: message 0: role='robot' is unknown: use one of system, .*, tool": (
        '{"messages": [{"role": "robot", "content": "a"}]}'
    ),
    "line 1: message 1: the assistant message has no content": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}'
    ),
    r"line 1: tools=\{'a': 1\} is not a list": json.dumps({"messages": CHAT, "tools": {"a": 1}}),
    "line 1: tools is a string, but not JSON": json.dumps({"messages": CHAT, "tools": "f()"}),
    "holds no record": "\n  \n",
}


@pytest.mark.parametrize("text", BAD_LINES)
def test_bad_lines(tmp_path, text):
    path = write(tmp_path / "bad.jsonl", BAD_LINES[text])
    with pytest.raises(DataError, match=f"bad.jsonl.*{text}"):
        read_chats(path)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl' is not a file"):
        read_chats(tmp_path / "missing.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=r"folder\.json' is not a file"):
        read_chats(tmp_path / "folder.json")
    with pytest.raises(DataError, match=r"a\.csv' has an unknown suffix: use \.jsonl, \.json, "):
        read_chats(write(tmp_path / "a.csv", "x"))
    with pytest.raises(DataError, match="holds no record"):
        read_chats(write(tmp_path / "empty.jsonl", ""))


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}] * 50), path)
    whole = path.read_bytes()
    for cut in (whole[: len(whole) // 2], whole[:-20], b"", b"not parquet at all"):
        with pytest.raises(DataError, match=r"a\.parquet' cannot be read as parquet.*cut off"):
            read_chats(write(path, cut))
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(DataError, match="row 1: no messages, only text"):
        read_chats(path)
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}]).slice(0, 0), path)
    with pytest.raises(DataError, match="holds no record"):
        read_chats(path)


# ----------------------------------------------------------------------------- encoding


def test_truncation_and_dropping(tokenizer):
    question = {"role": "user", "content": "0123456789"}
    records = [
        {"messages": CHAT},
        {"messages": [question, *CHAT]},
        {"messages": CHAT[:1]},
        {"messages": [CHAT[0], {**CHAT[1], "weight": 0}]},
    ]
    whole = [encode_chat(record["messages"], tokenizer) for record in records]
    length = len(whole[0]["input_ids"])
    encoded = encode_chats(records, tokenizer, max_length=length)
    assert [len(s["input_ids"]) for s in encoded.samples] == [length]
    assert (encoded.dropped, encoded.truncated) == (3, 1)
    assert encoded.summary() == (
        f"1 samples with {length} tokens, 3 of them answers; 1 truncated, 3 dropped without an "
        "answer."
    )
    everything = encode_chats(records, tokenizer)
    assert (everything.dropped, everything.truncated, len(everything.samples)) == (2, 0, 2)
    for sample, expected in zip(everything.samples, whole, strict=False):
        assert sample.keys() == expected.keys()
        assert all(torch.equal(sample[k], expected[k]) for k in sample)


def test_left_truncation_keeps_the_last_answer(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "truncation_side", "left")
    encoded = encode_chats([{"messages": CHAT}], tokenizer, max_length=4)
    assert tokenizer.decode(encoded.samples[0]["input_ids"]) == "yo<|im_end|>\n"
    # Of the two tokens left one is a newline and the other stands first: nothing predicts it.
    with pytest.raises(DataError, match="1 lost theirs to max_length=2 on the left side"):
        encode_chats([{"messages": CHAT}], tokenizer, max_length=2)
    assert encode_chats([{"messages": CHAT}], tokenizer, max_length=3).dropped == 0


def test_no_answers_at_all(tokenizer):
    records = [{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": CHAT[:1]}]
    text = r"no answers at all in 3 chats: 1 lost .* max_length=5 .* 2 have no trained assistant"
    with pytest.raises(DataError, match=text):
        encode_chats(records, tokenizer, max_length=5)
    with pytest.raises(DataError, match="no answers at all in 0 chats"):
        encode_chats([], tokenizer)


def test_encoding_errors_name_the_record(tokenizer):
    with pytest.raises(DataError, match="record 1: message 0: role='bot'"):
        encode_chats(
            [{"messages": CHAT}, {"messages": [{"role": "bot", "content": ""}]}], tokenizer
        )
    with pytest.raises(DataError, match="record 0: messages is None"):
        encode_chats([{"text": "a"}], tokenizer)
    with pytest.raises(DataError, match="max_length must be .* got 0"):
        encode_chats([{"messages": CHAT}], tokenizer, max_length=0)


def test_settings_and_tools_reach_every_chat(tokenizer, capsys):
    records = [{"messages": [*CHAT[:1], *CHAT], "tools": [{"name": "tick"}]}, {"messages": CHAT}]
    encoded = encode_chats(records, tokenizer, merge_context=False, progress=True)
    assert "encoding chats" in capsys.readouterr().err
    for sample, record in zip(encoded.samples, records, strict=True):
        expected = encode_chat(
            record["messages"], tokenizer, tools=record.get("tools"), merge_context=False
        )
        assert all(torch.equal(sample[k], expected[k]) for k in expected)
    assert "tick" in tokenizer.decode(encoded.samples[0]["input_ids"])
    assert encoded.samples[0]["turn_ids"].max() == 2


# ----------------------------------------------------------------------------- collating


def sample(*ids, answers=(), turns=None, needles=None):
    out = {
        "input_ids": torch.tensor(ids),
        "turn_ids": torch.tensor(turns or [0] * len(ids)),
        "answer_mask": torch.tensor([i in answers for i in range(len(ids))]),
    }
    if needles is not None:
        out["needle_mask"] = torch.tensor([i in needles for i in range(len(ids))])
    return out


A, B = sample(5, 6, 7, answers=[2], turns=[0, 0, 1]), sample(8, 9, answers=[1], turns=[0, 1])


def test_collate_right():
    batch = collate([A, B], pad_token_id=3)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 3]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "turn_ids": [[0, 0, 1], [0, 1, -1]],
        "answer_mask": [[False, False, True], [False, True, False]],
    }
    assert batch["turn_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["answer_mask"].dtype == torch.bool


def test_collate_left_with_everything():
    samples = [sample(5, needles=[0]), *pack([B, sample(4)], 4)]
    batch = collate(samples, pad_token_id=0, side="left", pad_to_multiple_of=4)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[0, 0, 0, 5], [0, 8, 9, 4]],
        "attention_mask": [[0, 0, 0, 1], [0, 1, 1, 1]],
        "turn_ids": [[-1, -1, -1, 0], [-1, 0, 1, 0]],
        "document_ids": [[-1, -1, -1, 0], [-1, 0, 0, 1]],
        "answer_mask": [[False] * 4, [False, False, True, False]],
        "needle_mask": [[False, False, False, True], [False] * 4],
    }


def test_collate_rounds_up_and_leaves_the_samples_alone():
    before = {name: values.clone() for name, values in B.items()}
    assert collate([B], pad_token_id=0, pad_to_multiple_of=2)["input_ids"].shape == (1, 2)
    batch = collate([B], pad_token_id=0, pad_to_multiple_of=8)
    assert batch["input_ids"].shape == (1, 8)
    batch["input_ids"].zero_()
    assert all(torch.equal(B[name], before[name]) for name in B)


def test_collator_is_collate_and_survives_pickling():
    collator = pickle.loads(pickle.dumps(Collator(3, side="left", pad_to_multiple_of=4)))
    expected = collate([A, B], pad_token_id=3, side="left", pad_to_multiple_of=4)
    assert all(torch.equal(collator([A, B])[name], expected[name]) for name in expected)


def test_collate_errors():
    with pytest.raises(DataError, match="samples is empty"):
        collate([], pad_token_id=0)
    with pytest.raises(DataError, match=r"side='top' is unknown: .*'right'.*'left'"):
        collate([A], pad_token_id=0, side="top")
    with pytest.raises(DataError, match=r"pad_token_id=None: set tokenizer\.pad_token"):
        collate([A], pad_token_id=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="pad_to_multiple_of must be .* got 0"):
        collate([A], pad_token_id=0, pad_to_multiple_of=0)


# ----------------------------------------------------------------------------- packing


def test_pack_first_fit():
    rows = pack([A, A, B, sample(4, needles=[0])], 5)
    assert [{name: v.tolist() for name, v in row.items()} for row in rows] == [
        {
            "input_ids": [5, 6, 7, 8, 9],
            "turn_ids": [0, 0, 1, 0, 1],
            "document_ids": [0, 0, 0, 1, 1],
            "answer_mask": [False, False, True, False, True],
        },
        {
            "input_ids": [5, 6, 7, 4],
            "turn_ids": [0, 0, 1, 0],
            "document_ids": [0, 0, 0, 1],
            "answer_mask": [False, False, True, False],
            "needle_mask": [False, False, False, True],
        },
    ]


def test_pack_again_keeps_documents_apart():
    rows = pack([*pack([B, B], 4), A], 7)
    assert [row["document_ids"].tolist() for row in rows] == [[0, 0, 1, 1, 2, 2, 2]]


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="sample 1 has 3 tokens, more than length=2"):
        pack([B, A], 2)
    assert pack([], 2) == []


def slow_first_fit(sizes, length):
    room, chosen = [], []
    for size in sizes:
        row = next((i for i, left in enumerate(room) if left >= size), len(room))
        room += [length] * (row == len(room))
        room[row] -= size
        chosen.append(row)
    return chosen


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=40), st.integers(12, 30))
def test_packing_invariants(sizes, length):
    assert _first_fit(sizes, length) == slow_first_fit(sizes, length)
    samples = [sample(*range(100 * i, 100 * i + size)) for i, size in enumerate(sizes)]
    rows = pack(samples, length)
    back = []
    for row in rows:
        documents = row["document_ids"]
        assert len(documents) <= length
        assert documents.tolist() == sorted(documents.tolist())
        assert documents.unique().tolist() == list(range(int(documents.max()) + 1))
        for i in documents.unique():
            back.append({k: v[documents == i] for k, v in row.items() if k != "document_ids"})
    back.sort(key=lambda s: int(s["input_ids"][0]))
    for got, expected in zip(back, samples, strict=True):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_a_packed_batch_trains_on_the_same_answers(tokenizer):
    records = [{"messages": [*CHAT, *CHAT]}, {"messages": CHAT}]
    encoded = encode_chats(records, tokenizer).samples
    (row,) = pack(encoded, 200)
    assert torch.equal(row["answer_mask"], torch.cat([s["answer_mask"] for s in encoded]))
    assert torch.equal(row["turn_ids"], torch.cat([s["turn_ids"] for s in encoded]))


def test_importing_imports_no_transformers():
    code = (
        "import sys, metafocus.data, metafocus.data.tokenizer, metafocus.data.stdlib_qa;"
        "sys.exit(bool({'transformers', 'tokenizers', 'pyarrow', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
