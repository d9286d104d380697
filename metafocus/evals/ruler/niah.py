"""Needles in a haystack: a secret value for each key, which the question asks for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from metafocus.evals.draft import Draft, Plan, hide, listed
from metafocus.evals.prose import Prose
from metafocus.evals.ruler.words import ADJECTIVES, NOISE, NOUNS, numbers, uuids, word_keys


@dataclass(frozen=True)
class Niah:
    """`haystack` is noise, essay or needle; `key` is word or uuid; `value` is number or uuid."""

    haystack: str
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1


# The published settings (RULER, scripts/synthetic.yaml).
NIAH = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", value="uuid"),
    "niah_multikey_1": Niah("essay", keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", key="uuid", value="uuid"),
    "niah_multivalue": Niah("essay", values=4),
    "niah_multiquery": Niah("essay", queries=4),
}

DEPTHS = 40  # the number of depths from 0 to 100 % for needles in an essay


def plan(settings: Niah, rng: random.Random, prose: Prose | None) -> Plan:
    """Draw keys, values and places; the size of the haystack is still to be chosen."""
    keys = word_keys(rng) if settings.key == "word" else uuids(rng)
    values = numbers(rng) if settings.value == "number" else uuids(rng)
    kind = settings.value
    many = settings.values > 1

    def needle(key: str, value: str) -> str:
        start = f"One of the secret {kind}s" if many else f"The secret {kind}"
        return f"{start} of {key} is {value}."

    table = [
        (key, list(islice(values, settings.values)))
        for key in islice(keys, max(settings.keys, settings.queries))
    ]
    asked = rng.sample(table, settings.queries)
    others = [row for row in table if row not in asked]
    # The needles of the question come first, because they are the evidence.
    pairs = [(key, value) for key, own in [*asked, *others] for value in own]
    needles = [needle(key, value) for key, value in pairs]
    references = tuple(value for _, own in asked for value in own)
    points = [point / (DEPTHS - 1) for point in rng.sample(range(DEPTHS), len(needles))]
    draws = [rng.random() for _ in needles]
    start = prose.place(rng) if prose else 0
    distractors: list[str] = []

    def units(n: int) -> list[str]:
        if settings.haystack == "noise":
            return [NOISE] * n
        if settings.haystack == "essay":
            assert prose is not None
            return prose.stretch(start, n)
        _extend(distractors, n, (needle(k, v) for k, v in zip(keys, values, strict=False)))
        return distractors[:n]

    names = listed([key for key, _ in asked])
    plural = len(references) > 1
    noun, verb = (f"{kind}s", "are") if plural else (kind, "is")
    question = (
        f"What {verb} {'all ' if plural else ''}the secret {noun} of {names} given in the text?"
    )
    heading = (
        f"Some secret {kind}s are hidden in the following text. Keep them in mind: a question "
        "about them comes at the end.\n\n"
    )
    prefix = f"The secret {noun} of {names} {verb}"

    def build(n: int) -> Draft:
        gap = " " if settings.haystack == "essay" else "\n"
        if settings.haystack == "essay":
            slots = [int(n * point) for point in points]
        else:
            slots = [int((n + 1) * draw) for draw in draws]
        text, spans, depths = hide(heading, units(n), needles, slots, gap)
        return Draft(
            prompt=f"{text}\n\n{question}",
            question=question,
            prefix=prefix,
            answer=f"{prefix} {listed(references)}.",
            references=references,
            evidence=spans[: len(references)],
            depths=depths[: len(references)],
            aligned=True,
        )

    most = 1_000_000
    if settings.haystack == "needle" and settings.key == "word":
        most = len(ADJECTIVES) * len(NOUNS) - len(table)
    return Plan(build, most=most)


def _extend(known: list[str], n: int, more: Iterator[str]) -> None:
    known += islice(more, max(n - len(known), 0))
