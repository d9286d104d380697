"""The tasks: facts among sentences of prose, and a question with a short answer.

qa1 and qa4 are stories of BABILong; niah is a table of codes. Here a prompt is compact, facts and
question without instructions, and an answer is a sentence like the facts, so that a small model can
learn it: it finds what it has begun to say.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from metafocus.data import encode_chat
from metafocus.evals.babilong import World, solve, tell
from metafocus.evals.fit import largest
from metafocus.evals.prose import Prose, builtin_prose, words_of

WORLD = World()
_CODES, _WORDS = 4, 60


@dataclass(frozen=True)
class Question:
    """A question about some facts, its answer, and the numbers of the facts that support it."""

    text: str
    answer: str
    supports: tuple[int, ...]


def prose(split: str) -> Prose:
    """Sentences of the standard library that name nothing of the stories."""
    return builtin_prose(split).without(WORLD.names)


@lru_cache(maxsize=1)
def code_words() -> tuple[str, ...]:
    """A few short words of the prose."""
    words = [w for w in words_of(builtin_prose("train").sentences) if len(w) <= 6]
    return tuple(words[:: max(len(words) // _WORDS, 1)][:_WORDS])


def facts(task: str, rng: random.Random) -> tuple[list[str], list[Question]]:
    """Return facts and every question that the task asks about them, in random order."""
    if task == "niah":
        keys = rng.sample(code_words(), rng.randint(1, _CODES))
        values = [rng.choice(code_words()) for _ in keys]
        told = [f"The code of {k} is {v}." for k, v in zip(keys, values, strict=True)]
        asked = [
            Question(f"What is the code of {k}?", fact, (i,))
            for i, (k, fact) in enumerate(zip(keys, told, strict=True))
        ]
    else:
        story = tell(task, rng, WORLD)
        told = list(story.facts)
        asked = [Question(story.question, sentence(story.question, story.answer), story.supports)]
        if task == "qa1":
            # Of everybody that moved, not of one: more to learn from a story.
            last = {fact.split()[0]: i for i, fact in enumerate(told)}
            questions = {f"Where is {person}?": i for person, i in last.items()}
            asked = [
                Question(q, sentence(q, solve(task, " ".join(told), q)), (i,))
                for q, i in questions.items()
            ]
    rng.shuffle(asked)
    return told, asked


def sentence(question: str, answer: str) -> str:
    """Return an answer of BABILong as a sentence that says what was asked.

    Example:
        >>> sentence("Where is Mary?", "garden")
        'Mary is in the garden.'
        >>> sentence("What is north of the kitchen?", "office")
        'The office is north of the kitchen.'
        >>> sentence("What is the kitchen south of?", "office")
        'The kitchen is south of the office.'
    """
    words = question.rstrip("?").split()
    if words[0] == "Where":
        return f"{words[2]} is in the {answer}."
    if words[2] == "the":
        return f"The {words[3]} is {words[4]} of the {answer}."
    return f"The {answer} is {' '.join(words[2:])}."


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
    task: str, name: str, noise: Prose, length: int, tokenizer: Any, turns: int = 1
) -> dict[str, Any]:
    """Return one encoded chat of nearly, and at most, `length` tokens; the same name, the same.

    Raises:
        ValueError: if the facts alone are longer.
    """

    def at(sentences: int) -> dict[str, Any]:
        # The same draws at each size: only the noise grows.
        messages = chat(task, random.Random(f"{task} {name}"), noise, sentences, turns)
        return encode_chat(messages, tokenizer)

    found = largest(lambda n: len(at(n)["input_ids"]), length, most=10_000, slack=24)
    if found is None:
        raise ValueError(f"length={length} does not hold the facts of {task}: raise it.")
    return at(found)


def samples(
    tasks: tuple[str, ...],
    n: int,
    name: str,
    noise: Prose,
    length: int,
    tokenizer: Any,
    turns: int = 1,
) -> list[dict[str, Any]]:
    """Return n samples of the tasks in turn."""
    return [
        sample(tasks[i % len(tasks)], f"{name} {i}", noise, length, tokenizer, turns)
        for i in range(n)
    ]
