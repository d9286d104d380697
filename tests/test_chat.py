from __future__ import annotations

import re
from itertools import groupby

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metafocus.data import encode_chat
from metafocus.data.tokenizer import CHATML, train_tokenizer
from metafocus.errors import DataError

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
    with pytest.raises(DataError, match=r"rewrites history, so message 1 cannot be located.*split"):
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
    with pytest.raises(DataError, match="merge_context=True"):
        encode_chat(THOUGHTS, tokenizer, merge_context=False)


def test_marks_that_are_not_one_run_per_answer_are_refused(tokenizer):
    tokenizer.chat_template = REWRITING_MARKED.replace(
        "{{- m.content", "{%- endgeneration %}{{- '|' }}{%- generation %}{{- m.content", 1
    )
    with pytest.raises(DataError, match="3 marked runs for 2 assistant messages"):
        encode_chat(THOUGHTS, tokenizer)


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


def test_marks_cover_all_tokens_of_the_last_character(tokenizer):
    tokenizer.chat_template = CONTENT_ONLY
    sample = encode_chat([user("a"), answer("b🙂")], tokenizer)
    assert tokenizer.decode(sample["input_ids"][sample["answer_mask"]]) == "b🙂"


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
    "refuses these messages": [user([{"type": "text", "text": "a"}])],
}


@pytest.mark.parametrize("text", BAD)
def test_bad_messages(tokenizer, text):
    with pytest.raises(DataError, match=text):
        encode_chat(BAD[text], tokenizer)


def test_bad_settings(tokenizer):
    with pytest.raises(
        DataError, match="max_length must be .* a token is predicted from another one, got 1"
    ):
        encode_chat([user("a")], tokenizer, max_length=1)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template: .*tokenizer\.chat_template"):
        encode_chat([user("a")], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses these messages \(roles must alternate\).*user"):
        encode_chat([user("a")], tokenizer)
    tokenizer.chat_template = CHATML.replace("message.content or ''", "range(99999) | random")
    with pytest.raises(DataError, match="again gives other ids"):
        encode_chat([user("a"), answer("b")], tokenizer)
