"""A built-in set of small science questions, made by code: nothing to download, nothing gated."""

from __future__ import annotations

import random

from metafocus.checks import whole
from metafocus.errors import DataError
from metafocus.evals.agentic.questions import Choice, shuffled
from metafocus.evals.agentic.topics import TOPICS, Problem

MAKERS = {maker.__name__: (field, maker) for field, row in TOPICS.items() for maker in row}
_DRAWS, _WRONG = 200, 3
_APART = 0.03  # choices differ by 3 % at least: more than rounding to three digits


def science(n: int, seed: int = 0) -> list[Choice]:
    """Make n questions of physics, chemistry and biology, with four choices each.

    Wrong choices are the results of typical mistakes: a forgotten factor, a wrong unit, the other
    logarithm. Topics take turns, and question i depends on the seed and i alone. They are easier
    than GPQA's: what they show is that the episodes, the tool and the scores work, and whether a
    model calculates; not what it knows.

    Raises:
        DataError: fewer than one question.

    Example:
        >>> from metafocus.evals.agentic import science
        >>> question = science(1)[0]
        >>> len(question.choices), question.letter in "ABCD"
        (4, True)
    """
    whole("n", n, 1, error=DataError)
    names = list(MAKERS)
    return [
        _question(names[i % len(names)], random.Random(f"science {seed} {i}")) for i in range(n)
    ]


def _question(name: str, rng: random.Random) -> Choice:
    field, maker = MAKERS[name]
    for _ in range(_DRAWS):
        problem = maker(rng)
        wrong = _apart(problem)
        if len(wrong) >= _WRONG:
            chosen = rng.sample(wrong, _WRONG)
            texts = [_text(value, problem.unit) for value in chosen]
            right = _text(problem.value, problem.unit)
            return shuffled(problem.question, right, texts, rng, f"{field}: {name}")
    raise AssertionError(f"{name}: mistakes that coincide in {_DRAWS} draws")


def _apart(problem: Problem) -> list[float]:
    """The mistakes that cannot be taken for the right value or for each other."""
    kept = [problem.value]
    for value in problem.mistakes:
        if value > 0 and all(abs(value - old) > _APART * max(value, old) for old in kept):
            kept.append(value)
    return kept[1:]


def _text(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}".strip()
