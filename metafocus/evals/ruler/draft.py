"""A question of RULER with n units of noise, and needles hidden at known places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Draft:
    """A question over a text with noise; `evidence` has character spans of the prompt."""

    prompt: str
    question: str
    prefix: str
    answer: str
    references: tuple[str, ...]
    evidence: tuple[tuple[int, int], ...] = ()
    depths: tuple[float, ...] = ()
    aligned: bool = False


@dataclass(frozen=True)
class Plan:
    """`build(n)` makes the question with n units of noise, for `least` <= n <= `most`."""

    build: Callable[[int], Draft]
    least: int = 0
    most: int = 1_000_000


def hide(
    heading: str, units: Sequence[str], needles: Sequence[str], slots: Sequence[int], gap: str
) -> tuple[str, tuple[tuple[int, int], ...], tuple[float, ...]]:
    """Return a text with needle i before unit `slots[i]`, and the spans and depths of needles.

    Spans and depths are in the order of the needles. Needles in one slot keep their order.

    Example:
        >>> from metafocus.evals.ruler.draft import hide
        >>> hide("H: ", ["a", "b"], ["x"], [1], " ")
        ('H: a x b', ((5, 6),), (0.4,))
    """
    order = sorted(range(len(needles)), key=lambda i: slots[i])
    pieces: list[str] = []
    spans: dict[int, tuple[int, int]] = {}
    at, done = len(heading), 0
    for i in order:
        between = units[done : slots[i]]
        pieces += between
        at += sum(len(unit) + len(gap) for unit in between)
        done = max(done, slots[i])
        spans[i] = (at, at + len(needles[i]))
        pieces.append(needles[i])
        at += len(needles[i]) + len(gap)
    pieces += units[done:]
    context = gap.join(pieces)
    found = tuple(spans[i] for i in range(len(needles)))
    depths = tuple((start - len(heading)) / len(context) for start, _ in found)
    return heading + context, found, depths


def listed(words: Sequence[str]) -> str:
    """Return "a", "a and b", or "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
