"""The tasks: facts among sentences of prose, and questions with short answers.

qa1 to qa3 are stories of BABILong, and niah is a table of codes. A prompt has the facts and a
question without instructions, and an answer is a sentence like the facts. stdlib asks what a
documented function does. A chat asks up to a few questions about one text, each in its own turn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from metafocus.data import encode_chat, stdlib_qa
from metafocus.errors import DataError
from metafocus.evals import Prose, builtin_prose, largest, words_of
from metafocus.evals.babilong import World, solve, tell

WORLD = World()
_CODES, _WORDS, _TRIES = 4, 60, 100


@dataclass(frozen=True)
class Question:
    """A question about some facts, its answer, and the numbers of the facts that support it."""

    text: str
    answer: str
    supports: tuple[int, ...] = ()


@lru_cache(maxsize=2)
def prose(split: str) -> Prose:
    """Sentences of the standard library that name nothing of the stories."""
    return builtin_prose(split).without(WORLD.names)


@lru_cache(maxsize=1)
def code_words() -> tuple[str, ...]:
    """A few short words of the prose."""
    words = [w for w in words_of(builtin_prose("train").sentences) if len(w) <= 6]
    return tuple(words[:: max(len(words) // _WORDS, 1)][:_WORDS])


def facts(task: str, rng: random.Random) -> tuple[list[str], list[Question]]:
    """Return facts and questions about them in random order.

    The supports of qa2 and qa3 are known for the first question alone: the story's own.
    """
    if task == "niah":
        keys = rng.sample(code_words(), rng.randint(2, _CODES))
        values = [rng.choice(code_words()) for _ in keys]
        told = [f"The code of {k} is {v}." for k, v in zip(keys, values, strict=True)]
        asked = [
            Question(f"What is the code of {k}?", fact, (i,))
            for i, (k, fact) in enumerate(zip(keys, told, strict=True))
        ]
        rng.shuffle(asked)
        return told, asked
    story = tell(task, rng, WORLD)
    told = list(story.facts)
    if task == "qa1":
        last = {fact.split()[0]: i for i, fact in enumerate(told)}
        asked = [_solved(task, told, f"Where is {who}?", (i,)) for who, i in last.items()]
        rng.shuffle(asked)
        return told, [question for question in asked if question]
    others = [f"Where is the {thing}?" for thing in WORLD.objects]
    if task == "qa3":
        others = [
            f"Where was the {thing} before the {room}?"
            for thing in WORLD.objects
            for room in WORLD.rooms
        ]
    rng.shuffle(others)
    first = Question(story.question, sentence(story.question, story.answer), story.supports)
    more = [_solved(task, told, text) for text in others if text != story.question]
    return told, [first, *(question for question in more if question)]


def _solved(
    task: str, told: list[str], text: str, supports: tuple[int, ...] = ()
) -> Question | None:
    try:
        answer = solve(task, " ".join(told), text)
    except DataError:
        return None  # the facts do not determine it
    return Question(text, sentence(text, answer), supports)


def sentence(question: str, answer: str) -> str:
    """Return an answer of BABILong as a sentence that says what was asked.

    Example:
        >>> sentence("Where is Mary?", "garden")
        'Mary is in the garden.'
        >>> sentence("Where is the milk?", "office")
        'The milk is in the office.'
        >>> sentence("Where was the milk before the office?", "garden")
        'Before the office the milk was in the garden.'
    """
    words = question.rstrip("?").split()
    if words[1] == "was":
        return f"Before the {words[6]} the {words[3]} was in the {answer}."
    if words[2] == "the":
        return f"The {words[3]} is in the {answer}."
    return f"{words[2]} is in the {answer}."


def chat(
    task: str, rng: random.Random, noise: Prose, sentences: int, turns: int = 1
) -> list[dict[str, Any]]:
    """Return a chat whose facts, in their order, stand among so many sentences of noise.

    The facts and the first question are one message; up to `turns` questions are asked.
    """
    told, asked = facts(task, rng)
    asked = asked[:turns]
    supports = {i for question in asked for i in question.supports}
    slots = sorted(rng.random() for _ in told)
    around = noise.stretch(noise.place(rng), sentences) if sentences else []
    pieces = [(i / max(sentences, 1), -1, text) for i, text in enumerate(around)]
    pieces += [(slot, i, text) for i, (slot, text) in enumerate(zip(slots, told, strict=True))]
    text, evidence = "", []
    for _, i, piece in sorted(pieces, key=lambda p: p[:2]):
        if i in supports:
            evidence.append([len(text), len(text) + len(piece)])
        text += piece + " "
    first = {"role": "user", "content": text.rstrip() + "\n" + asked[0].text, "evidence": evidence}
    messages: list[dict[str, Any]] = [first]
    for i, question in enumerate(asked):
        if i:
            messages.append({"role": "user", "content": question.text})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def sample(
    task: str, name: str, split: str, length: int, tokenizer: Any, turns: int = 1
) -> dict[str, Any]:
    """Return one encoded chat of nearly, and at most, `length` tokens; the same name, the same.

    A story that is longer than that is drawn again.

    Raises:
        ValueError: if no chat of the task is as short.
    """
    noise = prose(split)
    for attempt in range(_TRIES):
        seed = f"{task} {split} {name} {attempt}"

        def at(size: int, seed: str = seed) -> dict[str, Any]:
            # The same draws at each size: only the text around the facts grows.
            if task == "stdlib":
                return encode_chat(_documentation(seed, split, size, tokenizer, turns), tokenizer)
            return encode_chat(chat(task, random.Random(seed), noise, size, turns), tokenizer)

        least = 60 * (turns + 1) if task == "stdlib" else 0

        def tokens(size: int, at: Any = at) -> int:
            return len(at(size)["input_ids"])

        try:
            found = largest(tokens, length, least=least, most=10_000, slack=24)
        except DataError:
            continue  # the documentation of the drawn functions is longer
        if found is not None:
            return at(found)
    raise ValueError(f"length={length} does not hold the facts of {task}: raise it.")


def _documentation(
    seed: str, split: str, size: int, tokenizer: Any, turns: int
) -> list[dict[str, Any]]:
    number = random.Random(seed).randrange(2**31)
    (made,) = stdlib_qa.generate(
        tokenizer, split=split, n=1, context_tokens=size, turns=turns, seed=number
    )
    return made["messages"]


def samples(
    tasks: tuple[str, ...],
    n: int,
    name: str,
    split: str,
    length: int,
    tokenizer: Any,
    turns: int = 1,
) -> list[dict[str, Any]]:
    """Return n samples of the tasks in turn."""
    return [
        sample(tasks[i % len(tasks)], f"{name} {i}", split, length, tokenizer, turns)
        for i in range(n)
    ]
