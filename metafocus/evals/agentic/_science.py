"""A built-in set of small science questions that are made by code, without any download."""

from __future__ import annotations

import random

from metafocus.checks import whole
from metafocus.errors import DataError
from metafocus.evals.agentic.questions import Choice, shuffled
from metafocus.evals.agentic.topics import TOPICS, Exercise

MAKERS = {maker.__name__: (field, maker) for field, row in TOPICS.items() for maker in row}
_DRAWS, _WRONG = 200, 3
_APART = 0.03  # choices differ by at least 3 %, which is more than rounding to three digits


def science(n: int, seed: int = 0) -> list[Choice]:
    """Make n questions of physics, chemistry and biology, with four choices each.

    Wrong choices are the results of typical mistakes: a forgotten factor, a wrong unit, the wrong
    logarithm. Topics alternate, and question i depends only on the seed and i. The questions are
    easier than GPQA's. They show that the chats, the tool and the scores work, and whether a model
    can calculate. They do not test knowledge.

    Raises:
        DataError: if `n` is below 1.

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


def _apart(problem: Exercise) -> list[float]:
    """Return the mistakes that differ enough from the right value and from each other."""
    kept = [problem.value]
    for value in problem.mistakes:
        if value > 0 and all(abs(value - old) > _APART * max(value, old) for old in kept):
            kept.append(value)
    return kept[1:]


def _text(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}".strip()
