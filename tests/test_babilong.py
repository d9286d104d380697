from __future__ import annotations

import random
import re

import pytest

from metafocus.data import encode_chat, encode_chats, read_chats
from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError
from metafocus.evals import Prose, builtin_prose, prose_from_file, token_windows, write_chats
from metafocus.evals.babilong import TASKS, World, generate, solve, tell
from metafocus.evals.babilong.worlds import MOST_FACTS
from metafocus.evals.fit import largest
from metafocus.evals.run import prompt_counter
from metafocus.evals.scorers import babilong_official, lm_eval_substring

OTHER = World(
    rooms=("attic", "cellar", "porch", "library"),
    people=("Ada", "Bram", "Cleo"),
    objects=("lamp", "rope"),
    givers=("Ada", "Dora", "Emil"),
    move=("ran to", "strolled over to"),
    get=("lifted", "pocketed"),
    drop=("abandoned", "set aside"),
    give=("offered",),
    tails=("", " then"),
)
FEWEST = {"qa1": 2, "qa2": 3, "qa3": 3, "qa4": 2, "qa5": 1}
SUPPORTS = {"qa1": {1}, "qa2": {2}, "qa3": {3, 4, 5}, "qa4": {1}, "qa5": {1}}


def words(text):
    return len(text.split())


def context(item):
    return item.prompt.partition("<context>\n")[2].partition("\n</context>")[0]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(builtin_prose("train").sentences[:400], 1000)


def agree(task, world, n):
    rooms = set()
    for i in range(n):
        story = tell(task, random.Random(f"{task} {i}"), world)
        text = " ".join(story.facts)
        assert solve(task, text, story.question, world) == story.answer, story
        labels = world.labels(task)
        right = babilong_official(story.sentence, story.answer, story.question, labels)
        assert right == (story.answer != "none")  # the official scorer finds "one" in it
        assert lm_eval_substring(story.sentence, story.answer)
        assert FEWEST.get(task, 1) <= len(story.facts) <= MOST_FACTS[task]
        assert len(set(story.supports)) in SUPPORTS.get(task, range(1, 20))
        assert all(0 <= i < len(story.facts) for i in story.supports)
        # What is said to support the answer does so alone.
        supports = " ".join(story.facts[i] for i in story.supports)
        assert solve(task, supports, story.question, world) == story.answer, story
        rooms |= set(story.answer.split(",")) if task == "qa8" else {story.answer}
    return rooms


@pytest.mark.parametrize("world", [World(), OTHER], ids=["default", "other"])
@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_agrees(task, world):
    answers = set(world.labels(task))
    if task == "qa7" and len(world.objects) < 3:
        answers.remove("three")
    assert agree(task, world, 300) == answers


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_agrees_on_5000_stories(task):
    agree(task, World(), 5000)


@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_reads_the_whole_prompt(task):
    for item in generate(words, task=task, length=3000, n=20):
        assert solve(task, context(item), item.question) == item.references[0]


@pytest.mark.parametrize("length", [0, 600, 2000])
@pytest.mark.parametrize("task", TASKS)
def test_lengths_facts_and_evidence(tokenizer, task, length):
    world = World()
    for i, item in enumerate(generate(tokenizer, task=task, length=length and length + 600, n=4)):
        size = len(tokenizer.encode(item.prompt)) + item.new_tokens
        if length:
            assert item.length - 40 <= size <= item.length
        inside = context(item)
        assert item.prompt.endswith(item.question)
        evidence = [item.prompt[a:b] for a, b in item.evidence]
        start = item.prompt.index(inside)
        for text, (a, _), depth in zip(evidence, item.evidence, item.depths, strict=True):
            assert text.endswith(".") and any(name in text for name in world.task_names(task))
            assert 0 <= a - start < len(inside) and depth == (a - start) / len(inside)
        story = tell(task, random.Random(f"babilong {task} 0 {i}"), world)
        if item.question == story.question:  # else its facts were too many
            at = [inside.index(fact) for fact in story.facts[:1]]
            assert at and item.answer == story.sentence
            rest = inside
            for fact in story.facts:  # each after the one before it
                assert fact in rest
                rest = rest.partition(fact)[2]
            noise = inside
            for fact in story.facts:
                noise = noise.replace(fact, "", 1)
            names = "|".join(world.task_names(task))
            assert not re.search(rf"\b({names})\b", noise, re.IGNORECASE)
            assert bool(noise.strip()) == bool(length)


def test_stories_do_not_depend_on_n_or_length():
    few, many = (generate(words, task="qa1", length=500, n=n, seed=3) for n in (2, 5))
    assert few == many[:2]
    longer = generate(words, task="qa1", length=900, n=2, seed=3)
    assert [i.question for i in longer] == [i.question for i in few]
    assert [i.references for i in longer] == [i.references for i in few]
    assert few != generate(words, task="qa1", length=500, n=2, seed=4)


def test_facts_stand_everywhere_or_in_the_window():
    depths = [d for i in generate(words, task="qa4", length=1500, n=300) for d in i.depths]
    for quarter in range(4):
        share = sum(quarter / 4 <= d < (quarter + 1) / 4 for d in depths) / len(depths)
        assert 0.15 < share < 0.35  # 300 draws: the deviation is 0.025
    late = generate(words, task="qa1", length=2000, n=20, window=(0.5, 0.75))
    assert all(0.4 < depth < 0.85 for item in late for depth in item.depths)


def test_evidence_becomes_needle_tokens(tokenizer, tmp_path):
    item = generate(tokenizer, task="qa2", length=900, n=1)[0]
    sample = encode_chat(item.chat()["messages"], tokenizer)
    windows = token_windows(item, tokenizer)
    texts = [tokenizer.decode(sample["input_ids"][a:b]).strip() for a, b in windows]
    assert " ".join(texts) == " ".join(item.prompt[a:b] for a, b in sorted(item.evidence))
    assert sum(b - a for a, b in windows) == int(sample["needle_mask"].sum())
    said = tokenizer.decode(sample["input_ids"][sample["answer_mask"]])
    assert said == item.answer + "<|im_end|>"
    write_chats([item, item], tmp_path / "chats.jsonl")
    assert len(encode_chats(read_chats(tmp_path / "chats.jsonl"), tokenizer).samples) == 2


def test_the_template_is_counted_too(tokenizer):
    count = prompt_counter(tokenizer)
    for item in generate(count, task="qa1", length=800, n=3):
        message = [{"role": "user", "content": item.prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert 770 <= len(tokenizer.encode(text)) + item.new_tokens <= 800


def test_noise_from_a_file(tmp_path):
    path = tmp_path / "book.txt"
    lines = [f"Number {i} is a plain sentence of exactly ten words here." for i in range(30)]
    path.write_text("CHAPTER ONE\n\n" + "\n".join(lines) + " Mary saw it too, and she had not.\n\n")
    prose = prose_from_file(path)
    assert prose.sentences[:2] == tuple(lines[:2])
    item = generate(words, task="qa1", length=400, n=1, prose=prose)[0]
    assert "plain sentence" in context(item) and "Mary saw" not in item.prompt
    with pytest.raises(DataError, match="is not a file"):
        prose_from_file(tmp_path / "none.txt")
    path.write_text("Too short. All of it.")
    with pytest.raises(DataError, match="no sentence of 10 words"):
        prose_from_file(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="UTF-8"):
        prose_from_file(path)


@pytest.mark.parametrize(
    ("task", "text", "question", "answer"),
    [
        ("qa1", "Mary went to the office. John went to the garden.", "Where is Mary?", "office"),
        ("qa2", "John got the milk. John went to the garden.", "Where is the milk?", "garden"),
        (  # it stays where it was dropped
            "qa2",
            "John went to the office. John took the milk there. John left the milk. "
            "John went to the garden.",
            "Where is the milk?",
            "office",
        ),
        (
            "qa3",
            "John got the milk. John went to the garden. John moved to the office.",
            "Where was the milk before the office?",
            "garden",
        ),
        (
            "qa4",
            "The office is west of the garden. The hallway is east of the garden.",
            "What is the garden west of?",
            "hallway",
        ),
        (  # the latest gift counts
            "qa5",
            "Fred gave the milk to Jeff. Jeff passed the milk to Mary.",
            "Who received the milk?",
            "Mary",
        ),
    ],
)
def test_the_oracle_by_hand(task, text, question, answer):
    assert solve(task, text, question) == answer


@pytest.mark.parametrize(
    ("task", "text", "question"),
    [
        ("qa1", "Mary went to the office.", "Where is John?"),
        ("qa2", "Mary got the milk.", "Where is the milk?"),
        (  # two visits, two answers
            "qa3",
            "John got the milk. John went to the garden. John went to the office. John went to "
            "the hallway. John went to the office.",
            "Where was the milk before the office?",
        ),
        ("qa4", "The office is west of the garden.", "What is east of the garden?"),
        ("qa5", "Fred got the milk.", "Who gave the milk?"),
        ("qa1", "Mary went to the office.", "How is Mary?"),
    ],
)
def test_the_oracle_does_not_guess(task, text, question):
    with pytest.raises(DataError, match="does not determine"):
        solve(task, text, question)


def test_worlds_are_checked():
    with pytest.raises(DataError, match="rooms="):
        World(rooms=("attic", "cellar"))
    with pytest.raises(DataError, match="each once"):
        World(objects=("milk", "milk"))
    with pytest.raises(DataError, match="'room' is not a plain word or is part of"):
        World(rooms=("room", "bedroom", "attic"))
    with pytest.raises(DataError, match="not a plain word"):
        World(objects=("ice cream",))
    with pytest.raises(DataError, match=r"verbs \['left'\] mean two things"):
        World(get=("left",))


def test_errors():
    with pytest.raises(DataError, match="task='qa21' is unknown: use one of qa1"):
        generate(words, task="qa21", length=100, n=1)
    with pytest.raises(DataError, match=r"n must be.*got 0"):
        generate(words, task="qa1", length=100, n=0)
    with pytest.raises(DataError, match=r"length must be.*got -1"):
        generate(words, task="qa1", length=-1, n=1)
    with pytest.raises(DataError, match=r"length=60 cannot hold .* at least \d+ tokens"):
        generate(words, task="qa1", length=60, n=1)
    with pytest.raises(DataError, match="window="):
        generate(words, task="qa1", length=600, n=1, window=(0.9, 0.1))
    with pytest.raises(DataError, match="every sentence contains"):
        generate(words, task="qa1", length=600, n=1, prose=Prose(("Mary is here.",)))


@pytest.mark.parametrize("limit", [0, 5, 100, 997, 10**5])
@pytest.mark.parametrize("jump", [1, 7])
def test_largest(limit, jump):
    calls = []

    def size(n):
        calls.append(n)
        return jump * n + (n % 3) * (jump > 1)

    found = largest(size, limit, most=2000)
    assert size(found) <= limit and (found == 2000 or size(found + 1) > limit)
    assert len(calls) < 30
    assert largest(size, -1, most=10) is None
