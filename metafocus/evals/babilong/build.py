"""Hides a story in prose, as one prompt of a measured number of tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from metafocus.errors import DataError
from metafocus.evals.babilong.instructions import RULES
from metafocus.evals.babilong.simulator import tell
from metafocus.evals.babilong.story import Story
from metafocus.evals.babilong.worlds import TASKS, World
from metafocus.evals.draft import hide
from metafocus.evals.fit import largest
from metafocus.evals.items import Count, Item, check_request, counter
from metafocus.evals.prose import Prose, builtin_prose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 20
_MOST_SENTENCES = 1_000_000
_SHOTS, _EXAMPLE_DRAWS = 2, 40  # an example is the shortest of this many stories
_DRAWS = 200  # the largest number of stories that are drawn until one is short enough


def generate(
    tokenizer: PreTrainedTokenizerBase | Count,
    *,
    task: str,
    length: int,
    n: int,
    seed: int = 0,
    prose: Prose | None = None,
    world: World | None = None,
    window: tuple[float, float] = (0.0, 1.0),
) -> list[Item]:
    """Make `n` questions. Prompt and answer have almost `length` tokens, and never more.

    The facts of a story keep their order. Each is put into a gap between two sentences of the
    noise, which is drawn uniformly and with replacement. The last sentence of the noise is cut to
    fit. The same tokenizer, prose and seed give the same prompts. Story i depends neither on `n`
    nor on `length`, so lengths are compared on the same questions. Only if it has too many facts
    for the length, another story is drawn.

    Args:
        tokenizer: a tokenizer, or a function that counts the tokens of a prompt.
        task: "qa1" to "qa20".
        length: the number of tokens of the prompt (with instruction and examples) and of the
            answer, for which 20 are reserved. 0 means facts without noise.
        n: the number of questions.
        seed: selects the questions.
        prose: the noise. Default: the docstrings of the standard library. Sentences with a name
            of the world are left out.
        world: the names and verbs.
        window: the part of the noise that facts may be in, as fractions.

    Raises:
        DataError: if the task is unknown, the window is invalid, the prose has no usable sentence,
            or the length is too small for the facts.

    Example:
        >>> from metafocus.evals import babilong
        >>> item, = babilong.generate(lambda text: len(text.split()), task="qa1", length=400, n=1)
        >>> start, stop = item.evidence[0]
        >>> babilong.solve("qa1", item.prompt[start:stop], item.question) == item.references[0]
        True
    """
    check_request(TASKS, task, length, n)
    if not 0 <= window[0] <= window[1] <= 1:
        raise DataError(f"window={window!r}: give 0 <= start <= end <= 1")
    world = World() if world is None else world
    noise = None
    if length:
        noise = (builtin_prose() if prose is None else prose).without(world.task_names(task))
    count = counter(tokenizer)
    return [_item(count, task, length, f"{seed} {i}", noise, world, window) for i in range(n)]


def _item(
    count: Count,
    task: str,
    length: int,
    name: str,
    noise: Prose | None,
    world: World,
    window: tuple[float, float],
) -> Item:
    heading = _heading(task, world)
    rng = random.Random(f"babilong noise {task} {length} {name}")
    low, high = window
    start = noise.place(rng) if noise else 0
    limit = length - NEW_TOKENS
    story = _fitting_story(count, task, limit if noise else None, name, heading, world)
    draws = sorted(low + (high - low) * rng.random() for _ in story.facts)

    def assemble(
        n: int, words: int = 0
    ) -> tuple[str, tuple[tuple[int, int], ...], tuple[float, ...]]:
        sentences = noise.stretch(start, n + 1) if noise else []
        last = " ".join(sentences[n].split()[:words]) if words else ""
        return _prompt(heading, story, [*sentences[:n], *([last] if last else [])], draws)

    n = words = 0
    if noise is not None:
        fitting = largest(lambda k: count(assemble(k)[0]), limit, most=_MOST_SENTENCES, slack=8)
        n = fitting or 0
        most = len(noise.stretch(start + n, 1)[0].split()) - 1
        words = largest(lambda k: count(assemble(n, k)[0]), limit, most=most) or 0
    prompt, spans, depths = assemble(n, words)
    return Item(
        suite="babilong",
        task=task,
        length=length,
        prompt=prompt,
        question=story.question,
        answer=story.sentence,
        references=(story.answer,),
        new_tokens=NEW_TOKENS,
        evidence=tuple(spans[i] for i in story.supports),
        depths=tuple(depths[i] for i in story.supports),
        labels=world.labels(task),
    )


def _fitting_story(
    count: Count, task: str, limit: int | None, name: str, heading: str, world: World
) -> Story:
    rng = random.Random(f"babilong {task} {name}")
    needed = []
    for _ in range(_DRAWS):
        story = tell(task, rng, world)
        if limit is None:
            return story
        needed.append(count(_prompt(heading, story, [], [0.0] * len(story.facts))[0]))
        if needed[-1] <= limit:
            return story
    raise DataError(
        f"length={limit + NEW_TOKENS if limit is not None else 0} cannot hold the facts and "
        f"instruction of {task}, which with the answer take at least {min(needed) + NEW_TOKENS} "
        "tokens: raise it, or pass 0 for facts without noise"
    )


def _prompt(
    heading: str, story: Story, sentences: Sequence[str], draws: Sequence[float]
) -> tuple[str, tuple[tuple[int, int], ...], tuple[float, ...]]:
    """Return the prompt, and the spans and depths of the facts in it."""
    gaps = len(sentences) + 1
    slots = [min(int(draw * gaps), gaps - 1) for draw in draws]
    text, spans, depths = hide(heading, sentences, story.facts, slots, " ")
    return f"{text}\n</context>\n\nQuestion: {story.question}", spans, depths


@lru_cache(maxsize=32)
def _heading(task: str, world: World) -> str:
    """Return the instruction with short solved examples, up to the start of the context."""
    rng = random.Random(f"babilong examples {task}")
    shots = []
    while len(shots) < _SHOTS:
        story = min(
            (tell(task, rng, world) for _ in range(_EXAMPLE_DRAWS)), key=lambda s: len(s.facts)
        )
        shots.append(
            f"<example>\n{' '.join(story.facts)}\nQuestion: {story.question}\n"
            f"Answer: {story.sentence}\n</example>"
        )
    return (
        f"{RULES[task]} Sentences about other matters stand between; ignore them.\n\n"
        + "\n".join(shots)
        + "\n\n<context>\n"
    )
