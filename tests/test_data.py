"""From files of chats to batches: reading, turns and answers of a template, collating, packing."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metafocus.data import Collator, collate, encode_chat, encode_chats, pack, read_chats
from metafocus.data.batches import _first_fit
from metafocus.data.tokenizer import CHATML, train_tokenizer
from metafocus.errors import DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture(scope="module")
def small():
    return train_tokenizer(["hello there"], 270)


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- reading -----------------------------------------------------------------------------------


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
    pq.write_table(pa.table({"note": ["a"]}), path)
    with pytest.raises(DataError, match="row 1: no messages, only note"):
        read_chats(path)
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}]).slice(0, 0), path)
    with pytest.raises(DataError, match="holds no record"):
        read_chats(path)


# --- templates: turns, answers and evidence ----------------------------------------------------

UNMARKED = re.sub(r"\{%- (end)?generation %\}\n", "", CHATML)
CONTENT_ONLY = UNMARKED.replace(  # the end of the turn is not marked
    "{{- message.content or '' }}",
    "{%- generation %}{{- message.content or '' }}{%- endgeneration %}",
)
LLAMA = (
    "{{- '<|bos|>' }}{%- for m in messages %}"
    "{{- '<|head|>' + m.role + '<|/head|>\\n\\n' + (m.content | trim) + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}"
)
NO_PROMPT = (  # add_generation_prompt changes nothing, though there is a header
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
)
NO_HEADER = (  # add_generation_prompt changes nothing, because there is no header
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- ' ' + m.content + '<|im_end|>' }}"
    "{%- else %}{{- '[INST] ' + m.content + ' [/INST]' }}{%- endif %}{%- endfor %}"
)
CLOSED = (  # a finished chat gets an end-of-sequence token that a message within it does not
    "{%- for m in messages %}{{- m.role + ': ' + m.content + '<|eot|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- else %}{{- '<|im_end|>' }}{%- endif %}"
)
THINKING = (  # only the last message keeps its reasoning
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' %}GEN{{- ('<t>' + m.why + '</t>') if loop.last else '' }}"
    "{{- m.content + '<|im_end|>' }}END{{- '\\n' }}"
    "{%- else %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
REWRITING = THINKING.replace("GEN", "").replace("END", "")
REWRITING_MARKED = THINKING.replace("GEN", "{%- generation %}").replace(
    "END", "{%- endgeneration %}"
)
JOINED_TOOLS = (  # consecutive tool messages share one block
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<r>' + m.content + '</r>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}"
    "{%- endif %}{%- else %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
HEAD = "<|im_start|>assistant\n"

_TRAINED = train_tokenizer(["a \n\n\n b  c\n\nhello hello   there\n\n\n"] * 9, 290)
_TRAINED.add_special_tokens(
    {"additional_special_tokens": ["<|im_start|>", "<|bos|>", "<|head|>", "<|/head|>", "<|eot|>"]}
)


@pytest.fixture
def tokenizer():
    _TRAINED.chat_template = CHATML
    _TRAINED.truncation_side = "right"
    return _TRAINED


def system(text):
    return {"role": "system", "content": text}


def user(text, **more):
    return {"role": "user", "content": text, **more}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text):
    return {"role": "tool", "content": text}


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def table(sample, tokenizer):
    """Runs of tokens with one turn and one answer flag: (text, turn, is answer)."""
    ids, turns = sample["input_ids"].tolist(), sample["turn_ids"].tolist()
    rows = zip(turns, sample["answer_mask"].tolist(), ids, strict=True)
    runs = [(key, [r[2] for r in run]) for key, run in groupby(rows, key=lambda r: r[:2])]
    return [(tokenizer.decode(ids), *key) for key, ids in runs]


PAIRS = [user("a"), answer("b"), user("c"), answer("d")]

TABLES = {
    "multi-turn": (
        [system("be"), user("hi"), answer("yo"), user("so"), answer("no")],
        [
            (turn("system", "be") + turn("user", "hi") + HEAD, 0, False),
            ("yo<|im_end|>", 1, True),
            ("\n", 1, False),
            (turn("user", "so") + HEAD, 2, False),
            ("no<|im_end|>", 3, True),
            ("\n", 3, False),
        ],
    ),
    "consecutive users, a chat that ends with one": (
        [user("a"), user("b"), answer("c"), user("d")],
        [
            (turn("user", "a") + turn("user", "b") + HEAD, 0, False),
            ("c<|im_end|>", 1, True),
            ("\n", 1, False),
            (turn("user", "d"), 2, False),
        ],
    ),
    "an empty answer separates": (
        [user("a"), answer(""), user("b"), answer("c")],
        [
            (turn("user", "a") + HEAD, 0, False),
            ("<|im_end|>", 1, True),
            ("\n", 1, False),
            (turn("user", "b") + HEAD, 2, False),
            ("c<|im_end|>", 3, True),
            ("\n", 3, False),
        ],
    ),
    "an untrained answer separates": (
        [user("a"), answer("x", weight=0), user("b"), answer("c", weight=1)],
        [
            (turn("user", "a") + HEAD, 0, False),
            ("x<|im_end|>\n", 1, False),
            (turn("user", "b") + HEAD, 2, False),
            ("c<|im_end|>", 3, True),
            ("\n", 3, False),
        ],
    ),
    "an empty untrained answer separates": (
        [user("a"), answer("", weight=0), user("b"), answer("c")],
        [
            (turn("user", "a") + HEAD, 0, False),
            ("<|im_end|>\n", 1, False),
            (turn("user", "b") + HEAD, 2, False),
            ("c<|im_end|>", 3, True),
            ("\n", 3, False),
        ],
    ),
    "answers in a row, from the first message on": (
        [answer("a"), answer("b")],
        [
            (HEAD, 0, False),
            ("a<|im_end|>", 1, True),
            ("\n", 1, False),
            (HEAD, 2, False),
            ("b<|im_end|>", 3, True),
            ("\n", 3, False),
        ],
    ),
    "no answer": ([user("a"), user("b")], [(turn("user", "a") + turn("user", "b"), 0, False)]),
    "an answer that ends in white space, or quotes an end of turn": (
        [user("a"), answer("b<|im_end|> \n"), user("c"), answer(" d\n ")],
        [
            (turn("user", "a") + HEAD, 0, False),
            ("b<|im_end|> \n<|im_end|>", 1, True),
            ("\n", 1, False),
            (turn("user", "c") + HEAD, 2, False),
            (" d\n <|im_end|>", 3, True),
            ("\n", 3, False),
        ],
    ),
}


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize("name", TABLES)
def test_turns_and_answers(tokenizer, template, name):
    tokenizer.chat_template = template
    messages, expected = TABLES[name]
    sample = encode_chat(messages, tokenizer)
    assert table(sample, tokenizer) == expected
    assert {k: v.dtype for k, v in sample.items()} == {
        "input_ids": torch.int64,
        "turn_ids": torch.int64,
        "answer_mask": torch.bool,
    }


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
def test_every_message_a_turn(tokenizer, template):
    tokenizer.chat_template = template
    messages = [system("s"), user("a"), answer("", weight=0), user("b"), user("c"), answer("d")]
    sample = encode_chat(messages, tokenizer, merge_context=False)
    assert table(sample, tokenizer) == [
        (turn("system", "s"), 0, False),
        (turn("user", "a"), 1, False),
        (HEAD + "<|im_end|>\n", 2, False),
        (turn("user", "b"), 3, False),
        (turn("user", "c"), 4, False),
        (HEAD, 5, False),
        ("d<|im_end|>", 5, True),
        ("\n", 5, False),
    ]


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
def test_tools(tokenizer, template):
    tokenizer.chat_template = template
    tools = [{"type": "function", "function": {"name": "f"}}]
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    messages = [
        system("be"),
        user("go"),
        {"role": "assistant", "content": None, "tool_calls": calls},
        tool("1"),
        tool("2"),
        answer("3"),
    ]
    rows = table(encode_chat(messages, tokenizer, tools=tools), tokenizer)
    assert rows[0][0].startswith("<|im_start|>system\nbe\n\nYou may call")
    assert '{"type": "function", "function": {"name": "f"}}' in rows[0][0]
    assert rows[0][1:] == (0, False)
    call = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>'
    assert rows[1:] == [
        (call, 1, True),
        ("\n", 1, False),
        (turn("tool", "1") + turn("tool", "2") + HEAD, 2, False),
        ("3<|im_end|>", 3, True),
        ("\n", 3, False),
    ]
    without = table(encode_chat(messages, tokenizer), tokenizer)
    assert "You may call" not in without[0][0]


def test_header_template_with_bos_and_trimming(tokenizer):
    tokenizer.chat_template = LLAMA
    head = "<|head|>{}<|/head|>\n\n"
    rows = table(
        encode_chat([user("a"), answer(" b \n"), user("c"), answer("d")], tokenizer), tokenizer
    )
    assert rows == [
        ("<|bos|>" + head.format("user") + "a<|eot|>" + head.format("assistant"), 0, False),
        ("b<|eot|>", 1, True),
        (head.format("user") + "c<|eot|>" + head.format("assistant"), 2, False),
        ("d<|eot|>", 3, True),
    ]


@pytest.mark.parametrize("merge", [True, False])
def test_template_that_ignores_the_generation_prompt(tokenizer, merge):
    messages = [user("a"), answer("b"), user("c"), answer("d")]
    tokenizer.chat_template = UNMARKED
    expected = encode_chat(messages, tokenizer, merge_context=merge)
    tokenizer.chat_template = NO_PROMPT
    got = encode_chat(messages, tokenizer, merge_context=merge)
    assert table(got, tokenizer) == table(expected, tokenizer)


def test_template_without_headers(tokenizer):
    tokenizer.chat_template = NO_HEADER
    rows = table(
        encode_chat([user("a"), answer("b"), user("c"), answer("d")], tokenizer), tokenizer
    )
    assert "".join(text for text, _, _ in rows) == (
        "[INST] a [/INST] b<|im_end|>[INST] c [/INST] d<|im_end|>"
    )
    assert [(text.strip(), *flags) for text, *flags in rows] == [
        ("[INST] a [/INST]", 0, False),
        ("b<|im_end|>", 1, True),
        ("[INST] c [/INST]", 2, False),
        ("d<|im_end|>", 3, True),
    ]


def test_template_that_closes_a_finished_chat(tokenizer):
    tokenizer.chat_template = CLOSED
    rows = table(
        encode_chat([user("a"), answer("b"), user("c"), answer("d")], tokenizer), tokenizer
    )
    assert [(text.strip(), *flags) for text, *flags in rows] == [
        ("user: a<|eot|>\nassistant:", 0, False),
        ("b<|eot|>", 1, True),
        ("", 1, False),
        ("user: c<|eot|>\nassistant:", 2, False),
        ("d<|eot|>\n<|im_end|>", 3, True),
    ]


THOUGHTS = [user("a"), answer("b", why="x"), user("c"), answer("d", why="y")]


def test_template_that_rewrites_history_is_refused(tokenizer):
    tokenizer.chat_template = REWRITING
    with pytest.raises(
        DataError, match=r"rewrites history: it drops .* of message 1 .*turns='each'"
    ):
        encode_chat(THOUGHTS, tokenizer)
    rows = table(encode_chat(THOUGHTS[:2], tokenizer), tokenizer)
    assert rows[1] == ("<t>x</t>b<|im_end|>", 1, True)


def test_marks_rescue_a_template_that_rewrites_history(tokenizer):
    tokenizer.chat_template = REWRITING_MARKED
    untrained = [THOUGHTS[0], {**THOUGHTS[1], "weight": 0}, *THOUGHTS[2:]]
    assert table(encode_chat(untrained, tokenizer), tokenizer) == [
        (turn("user", "a") + HEAD, 0, False),
        ("b<|im_end|>\n", 1, False),
        (turn("user", "c") + HEAD, 2, False),
        ("<t>y</t>d<|im_end|>", 3, True),
        ("\n", 3, False),
    ]
    apart = encode_chat(untrained, tokenizer, merge_context=False)
    assert apart["turn_ids"].unique().tolist() == [0, 1, 2, 3]


def test_marks_may_be_several_runs(tokenizer):
    tokenizer.chat_template = REWRITING_MARKED.replace(
        "{{- m.content", "{%- endgeneration %}{{- '|' }}{%- generation %}{{- m.content", 1
    )
    untrained = [THOUGHTS[0], {**THOUGHTS[1], "weight": 0}, *THOUGHTS[2:]]
    rows = table(encode_chat(untrained, tokenizer), tokenizer)
    assert [row for row in rows if row[2]] == [("<t>y</t>", 3, True), ("d<|im_end|>", 3, True)]


def test_marks_outside_of_answers_are_refused(tokenizer):
    tokenizer.chat_template = (
        "{%- for m in messages %}{%- if m.role == 'user' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"marks 'a<\|im_end\|>.*in no assistant message"):
        encode_chat([user("a"), answer("b")], tokenizer)


def test_joined_tool_messages_have_no_boundary_of_their_own(tokenizer):
    tokenizer.chat_template = JOINED_TOOLS
    messages = [user("a"), answer("b"), tool("1"), tool("2"), answer("c")]
    rows = table(encode_chat(messages, tokenizer), tokenizer)
    assert rows[3] == ("<|im_start|>user\n<r>1</r>\n<r>2</r><|im_end|>\n" + HEAD, 2, False)
    with pytest.raises(DataError, match=r"message 2 cannot be located.*merge_context=True"):
        encode_chat(messages, tokenizer, merge_context=False)


def test_a_token_across_the_beginning_of_an_answer_belongs_to_it(tokenizer):
    tokenizer.chat_template = UNMARKED
    ids = tokenizer("\n\n\n", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1  # the header's newline merges with the answer's two
    rows = table(encode_chat([user("a"), answer("\n\n<|im_end|>b")], tokenizer), tokenizer)
    assert rows[:2] == [
        (turn("user", "a") + "<|im_start|>assistant", 0, False),
        ("\n\n\n<|im_end|>b<|im_end|>", 1, True),
    ]


def test_marks_cover_all_tokens_of_the_last_character_and_the_stop_token(tokenizer):
    tokenizer.chat_template = CONTENT_ONLY
    sample = encode_chat([user("a"), answer("b🙂")], tokenizer)
    assert tokenizer.decode(sample["input_ids"][sample["answer_mask"]]) == "b🙂<|im_end|>"


def test_slow_tokenizers_compare_token_ids():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = (
        "{%- for m in messages %}{{- m.role + ': ' }}"
        "{%- if m.role == 'assistant' %}{%- generation %}{{- m.content + '</s>' }}"
        "{%- endgeneration %}{%- else %}{{- m.content + '</s>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
    )
    messages = [user("a"), answer("b"), user("c"), answer("d")]
    assert table(encode_chat(messages, tokenizer), tokenizer) == [
        ("user: a</s>assistant: ", 0, False),
        ("b</s>", 1, True),
        ("user: c</s>assistant: ", 2, False),
        ("d</s>", 3, True),
    ]
    with pytest.raises(DataError, match="evidence needs a tokenizer that knows the characters"):
        encode_chat([user("a", evidence=[[0, 1]]), answer("b")], tokenizer)


TEXT = st.text(
    st.one_of(st.sampled_from(list("ab \n\té🙂中")), st.characters(exclude_categories=["Cs"])),
    max_size=8,
)
MESSAGE = st.one_of(
    st.builds(user, TEXT),
    st.builds(tool, TEXT),
    st.builds(lambda text, weight: answer(text, weight=weight), TEXT, st.sampled_from([0, 1])),
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(MESSAGE, min_size=1, max_size=6), st.booleans())
def test_generation_marks_and_prefixes_agree(tokenizer, messages, merge):
    tokenizer.chat_template = CHATML
    marked = encode_chat(messages, tokenizer, merge_context=merge)
    tokenizer.chat_template = UNMARKED
    prefixes = encode_chat(messages, tokenizer, merge_context=merge)
    for name in marked:
        assert torch.equal(marked[name], prefixes[name]), name
    turns = marked["turn_ids"]
    assert (turns.diff() >= 0).all()
    # No context token shares its turn with one on the other side of an assistant message.
    assistants = sum(m["role"] == "assistant" for m in messages)
    assert len(turns.unique()) >= assistants + (messages[0]["role"] != "assistant")


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_honours_the_side(tokenizer, side):
    tokenizer.truncation_side = side
    messages = [user("abcd", evidence=[[1, 3]]), answer("b"), user("c"), answer("d")]
    whole = encode_chat(messages, tokenizer)
    cut = encode_chat(messages, tokenizer, max_length=9)
    kept = slice(9) if side == "right" else slice(-9, None)
    assert set(cut) == set(whole) == {"input_ids", "turn_ids", "answer_mask", "needle_mask"}
    for name, values in whole.items():
        assert torch.equal(cut[name], values[kept])
    assert encode_chat(messages, tokenizer, max_length=10**6)["input_ids"].equal(whole["input_ids"])


def test_evidence_marks_its_tokens(tokenizer):
    first = "the cat. the cat sat 🙂 here."
    start = first.index("the cat sat")
    messages = [
        user(first, evidence=[[start, start + 11], [start + 4, start + 13]]),
        answer("the cat"),
        user("the cat sat", evidence=[[4, 7]]),
        answer("b"),
    ]
    sample = encode_chat(messages, tokenizer)
    ids, mask = sample["input_ids"], sample["needle_mask"]
    pieces = [
        tokenizer.decode([i for i, _ in run])
        for key, run in groupby(zip(ids.tolist(), mask.tolist(), strict=True), lambda r: r[1])
        if key
    ]
    assert [piece.strip() for piece in pieces] == ["the cat sat 🙂", "cat"]
    assert not (mask & sample["answer_mask"]).any()
    # The second of the equal texts in the first message is the one that is meant.
    before = tokenizer.decode(ids[: int(mask.int().argmax())])
    assert before.endswith("the cat.")
    assert torch.equal(
        ids, encode_chat([{**m, "evidence": None} for m in messages], tokenizer)["input_ids"]
    )


def test_evidence_survives_trimming_but_not_its_own(tokenizer):
    tokenizer.chat_template = LLAMA
    sample = encode_chat([user("  ab ", evidence=[[2, 3]]), answer("c")], tokenizer)
    assert tokenizer.decode(sample["input_ids"][sample["needle_mask"]]) == "a"
    with pytest.raises(DataError, match="drops, trims or repeats"):
        encode_chat([user("  ab ", evidence=[[0, 3]]), answer("c")], tokenizer)


BAD = {
    "messages is empty": [],
    "messages is 'hi'": "hi",
    "message 0: 'hi' is not a dict": ["hi"],
    r"message 1: role='bot' is unknown: use one of system, developer, user, assistant, tool": [
        user("a"),
        {"role": "bot", "content": "b"},
    ],
    "message 0: the user message has no content": [{"role": "user", "content": None}],
    "message 0: the assistant message has no content": [{"role": "assistant", "tool_calls": []}],
    "message 0: content=7 is neither": [user(7)],
    "weight=0.5 on a assistant message": [answer("a", weight=0.5)],
    "weight=0 on a user message": [user("a", weight=0)],
    "evidence belongs to a non-assistant": [answer("abc", evidence=[[0, 1]])],
    r"evidence span \[0, 4\] is not .* <= 3": [user("abc", evidence=[[0, 4]])],
    r"evidence span \[2, 2\]": [user("abc", evidence=[[2, 2]])],
    "evidence span 0 is not": [user("abc", evidence=[0, 1])],
    r"the part \{'type': 'image'\} of the content is not text": [user([{"type": "image"}])],
    "tool_calls='f' is not a list": [user("a"), answer("", tool_calls="f")],
    "train=1 on a assistant message: train is true or false": [answer("a", train=1)],
    "train=False on a user message": [user("a", train=False)],
}


@pytest.mark.parametrize("text", BAD)
def test_bad_messages(tokenizer, text):
    with pytest.raises(DataError, match=text):
        encode_chat(BAD[text], tokenizer)


def test_bad_settings(tokenizer):
    with pytest.raises(
        DataError, match=r"max_length must be .* a token is predicted from another one, got 1"
    ):
        encode_chat([user("a")], tokenizer, max_length=1)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template: .*tokenizer\.chat_template"):
        encode_chat([user("a")], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses these messages \(roles must alternate\).*user"):
        encode_chat([user("a")], tokenizer)
    tokenizer.chat_template = CHATML.replace("message.content or ''", "range(99999) | random")
    with pytest.raises(DataError, match=r"renders the chat differently .* every time"):
        encode_chat([user("a"), answer("b")], tokenizer)


# --- encoding ----------------------------------------------------------------------------------


def test_truncation_and_dropping(small):
    question = {"role": "user", "content": "0123456789"}
    records = [
        {"messages": CHAT},
        {"messages": [question, *CHAT]},
        {"messages": CHAT[:1]},
        {"messages": [CHAT[0], {**CHAT[1], "weight": 0}]},
    ]
    whole = [encode_chat(record["messages"], small) for record in records]
    length = len(whole[0]["input_ids"])
    encoded = encode_chats(records, small, max_length=length)
    assert [len(s["input_ids"]) for s in encoded.samples] == [length]
    assert (encoded.dropped, encoded.truncated) == (3, 1)
    assert encoded.summary() == (
        f"1 samples with {length} tokens, 3 of them answers; 1 truncated, 3 dropped without an "
        "answer."
    )
    everything = encode_chats(records, small)
    assert (everything.dropped, everything.truncated, len(everything.samples)) == (2, 0, 2)
    for sample, expected in zip(everything.samples, whole, strict=False):
        assert sample.keys() == expected.keys()
        assert all(torch.equal(sample[k], expected[k]) for k in sample)


def test_left_truncation_keeps_the_last_answer(small, monkeypatch):
    monkeypatch.setattr(small, "truncation_side", "left")
    encoded = encode_chats([{"messages": CHAT}], small, max_length=4)
    assert small.decode(encoded.samples[0]["input_ids"]) == "yo<|im_end|>\n"
    # Of the two tokens left one is a newline and the other stands first: nothing predicts it.
    with pytest.raises(DataError, match="1 lost theirs to max_length=2 on the left side"):
        encode_chats([{"messages": CHAT}], small, max_length=2)
    assert encode_chats([{"messages": CHAT}], small, max_length=3).dropped == 0


def test_no_answers_at_all(small):
    records = [{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": CHAT[:1]}]
    text = r"no answers at all in 3 chats: 1 lost .* max_length=5 .* 2 have no trained assistant"
    with pytest.raises(DataError, match=text):
        encode_chats(records, small, max_length=5)
    with pytest.raises(DataError, match="no answers at all in 0 chats"):
        encode_chats([], small)


def test_chats_that_cannot_be_encoded_are_skipped_and_named(small):
    bad = {"messages": [{"role": "bot", "content": ""}]}
    found = encode_chats([{"messages": CHAT}, bad, {"messages": CHAT}, *[bad] * 7], small)
    assert (len(found.samples), found.skipped, found.dropped) == (2, 8, 0)
    assert [reason.split(":")[0] for reason in found.reasons] == [
        f"record {i}" for i in (1, 3, 4, 5, 6)
    ]
    assert "8 chats were skipped:\n  record 1: message 0: role='bot'" in found.summary()
    assert found.summary().endswith("  and 3 more")
    with pytest.raises(DataError, match="record 1: message 0: role='bot'"):
        encode_chats([{"messages": CHAT}, bad], small, strict=True)
    with pytest.raises(
        DataError, match=r"8 of 8 chats cannot be encoded.*record 0: message 0: role"
    ):
        encode_chats([bad] * 8, small)
    with pytest.raises(DataError, match="record 0: no messages, only note"):
        encode_chats([{"note": "a"}], small)
    with pytest.raises(DataError, match=r"max_length must be .* got 0"):
        encode_chats([{"messages": CHAT}], small, max_length=0)


def test_settings_and_tools_reach_every_chat(small, capsys):
    records = [{"messages": [*CHAT[:1], *CHAT], "tools": [{"name": "tick"}]}, {"messages": CHAT}]
    encoded = encode_chats(records, small, merge_context=False, progress=True)
    assert "encoding chats" in capsys.readouterr().err
    for sample, record in zip(encoded.samples, records, strict=True):
        expected = encode_chat(
            record["messages"], small, tools=record.get("tools"), merge_context=False
        )
        assert all(torch.equal(sample[k], expected[k]) for k in expected)
    assert "tick" in small.decode(encoded.samples[0]["input_ids"])
    assert encoded.samples[0]["turn_ids"].max() == 2


# --- collating ---------------------------------------------------------------------------------


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
    with pytest.raises(DataError, match=r"pad_to_multiple_of must be .* got 0"):
        collate([A], pad_token_id=0, pad_to_multiple_of=0)


# --- packing -----------------------------------------------------------------------------------


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


def test_a_packed_batch_trains_on_the_same_answers(small):
    records = [{"messages": [*CHAT, *CHAT]}, {"messages": CHAT}]
    encoded = encode_chats(records, small).samples
    (row,) = pack(encoded, 200)
    assert torch.equal(row["answer_mask"], torch.cat([s["answer_mask"] for s in encoded]))
    assert torch.equal(row["turn_ids"], torch.cat([s["turn_ids"] for s in encoded]))


def test_importing_imports_no_transformers():
    code = (
        "import sys, metafocus.data, metafocus.data.tokenizer, metafocus.data.stdlib_qa;"
        "sys.exit(bool({'transformers', 'tokenizers', 'pyarrow', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
