from __future__ import annotations

import time

import pytest

from metafocus.data import encode_chats
from metafocus.data.stdlib_qa import _parse_library, entries, generate, texts
from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError


def words(text):
    return len(text.split())


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(texts("train")[:500], 1000)


def test_library_is_parsed_once_and_fast():
    _parse_library.cache_clear()
    start = time.perf_counter()
    entries("train")
    assert time.perf_counter() - start < 30  # about 3 s on an idle core
    assert entries("heldout") is not None and _parse_library.cache_info().misses == 1


def test_splits_share_no_module_and_no_text():
    train, heldout = entries("train"), entries("heldout")
    packages = [{entry.module.partition(".")[0] for entry in part} for part in (train, heldout)]
    assert not packages[0] & packages[1]
    assert not {e.summary.lower() for e in train} & {e.summary.lower() for e in heldout}
    assert 0.1 < len(heldout) / (len(train) + len(heldout)) < 0.3
    assert len(train) > 1000 and "json" in packages[1] | packages[0]


def test_entries_are_sentences_about_public_names():
    every = [*entries("train"), *entries("heldout")]
    assert len({e.name for e in every}) == len({e.summary.lower() for e in every}) == len(every)
    for entry in every:
        assert entry.name.startswith(entry.module + ".")
        assert not any(part.startswith("_") for part in entry.name.split("."))
        assert entry.module.split(".")[0] not in {"test", "idlelib", "lib2to3"}
        assert 20 <= len(entry.summary) <= 160 and len(entry.summary.split()) >= 4
        assert entry.summary[0].isupper() and entry.summary[-1] == "."
        assert (
            entry.text.split("\n")[1] == entry.summary and entry.name in entry.text.split("\n")[0]
        )
        assert len(entry.text) < 1600
    known = {e.name: e.summary for e in every}
    assert known["textwrap.dedent"] == (
        "Remove any common leading whitespace from every line in `text`."
    )


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("size", [150, 600])
def test_chats(tokenizer, split, size):
    known = {entry.name: entry for entry in entries(split)}
    other = {entry.name for entry in entries("heldout" if split == "train" else "train")}
    chats = generate(tokenizer, split=split, n=20, context_tokens=size, turns=2)
    assert len(chats) == 20
    for chat in chats:
        roles = [message["role"] for message in chat["messages"]]
        assert roles == ["user", "assistant"] * 2
        content = chat["messages"][0]["content"]
        assert 0.75 * size < len(tokenizer.encode(content)) <= size
        assert len(set(chat["asked"])) == 2
        for i, (name, span) in enumerate(
            zip(chat["asked"], chat["messages"][0]["evidence"], strict=True)
        ):
            question, answer = chat["messages"][2 * i]["content"], chat["messages"][2 * i + 1]
            assert f"What does {name} do?" in question
            assert content[slice(*span)] == answer["content"] == known[name].summary
            assert content.count(known[name].text) == 1
        shown = {block.split("\n")[0] for block in content.split("\n\n")}
        names = {line.removeprefix("class ").partition("(")[0] for line in shown}
        assert not names & other and names & known.keys()


def test_depth_is_uniform():
    chats = generate(words, n=300, context_tokens=400)
    depths = [chat["depth"][0] for chat in chats]
    assert all(0 <= depth < 1 for depth in depths)
    for quarter in range(4):
        share = sum(quarter / 4 <= depth < (quarter + 1) / 4 for depth in depths) / len(depths)
        assert 0.15 < share < 0.35
    first = chats[0]["messages"][0]
    start = first["content"].index(chats[0]["asked"][0])
    assert depths[0] == pytest.approx(start / len(first["content"]), abs=0.05)


def test_seeds():
    chats = generate(words, n=4, context_tokens=200, seed=3)
    assert chats == generate(words, n=4, context_tokens=200, seed=3)
    assert chats[:2] == generate(words, n=2, context_tokens=200, seed=3)
    assert chats != generate(words, n=4, context_tokens=200, seed=4)
    assert len({chat["asked"][0] for chat in generate(words, n=50, context_tokens=200)}) > 40


def test_a_tokenizer_counts_like_its_function(tokenizer):
    def count(text):
        return len(tokenizer.encode(text))

    by_function = generate(count, n=2, context_tokens=300)
    assert by_function == generate(tokenizer, n=2, context_tokens=300)


def test_counts_that_do_not_add_up_still_respect_the_limit():
    def jagged(text):
        return words(text) + (20 if text.count("\n\n") > 3 else 0)

    for chat in generate(jagged, n=10, context_tokens=300):
        assert jagged(chat["messages"][0]["content"]) <= 300


def test_evidence_becomes_needle_tokens(tokenizer):
    chats = generate(tokenizer, n=5, context_tokens=300)
    encoded = encode_chats(chats, tokenizer)
    assert len(encoded.samples) == 5 and encoded.dropped == 0
    for chat, sample in zip(chats, encoded.samples, strict=True):
        answer = chat["messages"][1]["content"]
        needle = tokenizer.decode(sample["input_ids"][sample["needle_mask"]])
        assert needle.strip() == answer
        said = tokenizer.decode(sample["input_ids"][sample["answer_mask"]])
        assert said == answer + "<|im_end|>"
        assert sample["turn_ids"].unique().tolist() == [0, 1]


def test_texts():
    assert texts() == [entry.text for entry in entries("train")]
    assert sorted(texts(None)) == sorted([*texts("train"), *texts("heldout")])


def test_errors():
    with pytest.raises(DataError, match="split='test' is unknown: use one of train, heldout"):
        generate(words, split="test", n=1, context_tokens=100)
    with pytest.raises(DataError, match="split='dev'"):
        texts("dev")
    with pytest.raises(DataError, match="n must be an integer >= 1, got 0"):
        generate(words, n=0, context_tokens=100)
    with pytest.raises(DataError, match="turns must be an integer >= 1, got 0"):
        generate(words, n=1, turns=0, context_tokens=100)
    with pytest.raises(DataError, match=r"context_tokens=12 cannot hold .* at least 1\d tokens"):
        generate(words, n=1, context_tokens=12)
    with pytest.raises(DataError, match=r"context_tokens=60 cannot hold .* turns=9"):
        generate(words, n=1, turns=9, context_tokens=60)
    with pytest.raises(DataError, match="more than the documentation of the heldout split"):
        generate(words, split="heldout", n=1, context_tokens=10**6)
