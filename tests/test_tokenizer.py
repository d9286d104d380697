from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError

TEXTS = ["The quick brown fox jumps over the lazy dog.", "A dog; a fox; a brown dog."] * 20
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1 + 2?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "three 🙂"},
]
TOKENIZER = train_tokenizer(TEXTS, 280)


def test_special_tokens():
    assert TOKENIZER.pad_token == "<|endoftext|>" and TOKENIZER.eos_token == "<|im_end|>"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert TOKENIZER.convert_tokens_to_ids(special) == [0, 1, 2]
    assert set(TOKENIZER.all_special_ids) == {0, 1, 2}
    assert TOKENIZER.is_fast


def test_vocabulary_is_learned_and_bounded():
    assert len(TOKENIZER) == 280
    assert len(train_tokenizer(["ab"], 4096)) < 270  # no more merges than the text has
    assert len(TOKENIZER.encode(" brown")) == 1
    assert len(train_tokenizer(["x"], 259).encode(" brown")) == 6


def test_the_same_texts_give_the_same_tokenizer():
    again = train_tokenizer(iter(TEXTS), 280)
    assert again.get_vocab() == TOKENIZER.get_vocab()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_survives(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_template_marks_answers_and_their_end():
    out = TOKENIZER.apply_chat_template(
        CHAT, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, mark in zip(out["input_ids"], out["assistant_masks"], strict=True) if mark]
    assert TOKENIZER.decode(marked) == (
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>three 🙂<|im_end|>'
    )


def test_template_text():
    text = TOKENIZER.apply_chat_template(CHAT[:2], tokenize=False)
    assert text == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n"
    with_tools = TOKENIZER.apply_chat_template(CHAT[:2], tools=TOOLS, tokenize=False)
    assert with_tools.startswith("<|im_start|>system\nbe brief\n\nYou may call these functions:\n{")
    assert with_tools.count("system") == 1 and '"name": "add"' in with_tools
    alone = TOKENIZER.apply_chat_template(CHAT[1:2], tools=TOOLS, tokenize=False)
    assert alone.startswith("<|im_start|>system\nYou may call these functions:\n{")
    prompt = TOKENIZER.apply_chat_template(CHAT[:4], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n")


def test_saving_and_loading(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == TOKENIZER.chat_template
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert set(loaded.all_special_ids) == {0, 1, 2}
    options = {"tools": TOOLS, "return_dict": True, "return_assistant_tokens_mask": True}
    got, expected = (t.apply_chat_template(CHAT, **options) for t in (loaded, TOKENIZER))
    assert got["input_ids"] == expected["input_ids"]
    assert got["assistant_masks"] == expected["assistant_masks"]


def test_errors():
    with pytest.raises(DataError, match=r"vocab_size=258 is below 259"):
        train_tokenizer(TEXTS, 258)
    with pytest.raises(DataError, match="texts is a single string"):
        train_tokenizer("hello")
    with pytest.raises(DataError, match="texts holds no text"):
        train_tokenizer(["", ""])
    with pytest.raises(DataError, match="texts holds 3 of type int"):
        train_tokenizer(["a", *([""] * 300), 3])  # pyright: ignore[reportArgumentType]


def test_texts_are_not_kept():
    """More texts than memory holds: each is dropped before many others are read."""

    class Text(str):
        alive, most = 0, 0

        def __del__(self):
            Text.alive -= 1

    def texts():
        for i in range(5000):
            Text.alive += 1
            Text.most = max(Text.most, Text.alive)
            yield Text(f"number {i}")

    train_tokenizer(texts(), 300)
    # The trainer reads a few hundred at a time.
    assert Text.most < 1000
