"""Variable tracking: which variables have a value, after a chain of assignments."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from itertools import islice

from metafocus.evals.draft import Draft, Plan, hide, listed
from metafocus.evals.fit import largest
from metafocus.evals.items import Count
from metafocus.evals.ruler.words import NOISE, letters

CHAINS, HOPS = 1, 4  # the published settings
SHOWN = 500  # tokens of the solved example, with shorter names
_LETTERS, _SHOWN_LETTERS = 5, 3
_INTRODUCTION = (
    "Variables are set among the following lines, each to a number or to the value of another "
    "variable. Follow the assignments.\n\n"
)


def plan(rng: random.Random, length: int, count: Count) -> Plan:
    """Draw the chain and its places; statements keep their order between lines of noise."""
    shown = _shown(rng, min(SHOWN, length // 4), count)
    names, value, statements = _chain(rng, _LETTERS)
    draws = sorted(rng.random() for _ in statements)
    question, prefix = _question(names, value)

    def build(n: int) -> Draft:
        slots = [int((n + 1) * draw) for draw in draws]
        heading = f"{shown}\n\n{_INTRODUCTION}"
        text, spans, depths = hide(heading, [NOISE] * n, statements, slots, "\n")
        return Draft(
            prompt=f"{text}\n\n{question}",
            question=question,
            prefix=prefix,
            answer=f"{prefix} {listed(names)}.",
            references=names,
            evidence=spans,
            depths=depths,
            aligned=True,
        )

    return Plan(build)


def _shown(rng: random.Random, tokens: int, count: Count) -> str:
    """Return a solved example of at most so many tokens, if one without noise is that short."""
    names, value, statements = _chain(rng, _SHOWN_LETTERS)
    draws = sorted(rng.random() for _ in statements)
    question, prefix = _question(names, value)

    def build(n: int) -> str:
        slots = [int((n + 1) * draw) for draw in draws]
        text, _, _ = hide(_INTRODUCTION, [NOISE] * n, statements, slots, "\n")
        return f"{text}\n\n{question}\n{prefix} {listed(names)}."

    return build(largest(lambda n: count(build(n)), tokens, most=100) or 0)


def _chain(rng: random.Random, size: int) -> tuple[tuple[str, ...], str, list[str]]:
    names = tuple(islice(letters(rng, size, string.ascii_uppercase), HOPS + 1))
    value = str(rng.randint(10000, 99998))
    sources = [value, *(f"VAR {name}" for name in names)]
    return names, value, [f"VAR {n} = {s}" for n, s in zip(names, sources, strict=False)]


def _question(names: Sequence[str], value: str) -> tuple[str, str]:
    return (
        f"Which variables have the value {value}? There are {len(names)} of them.",
        f"The variables with the value {value} are",
    )
