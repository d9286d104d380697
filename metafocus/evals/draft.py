"""A question with n units of noise around it, and needles hidden at known places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from metafocus.errors import DataError
from metafocus.evals.fit import largest
from metafocus.evals.items import Count, Item


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


def fitted(
    count: Count, plan: Plan, *, suite: str, task: str, length: int, new: int
) -> tuple[Item, int]:
    """Return the largest question that fits into a length, and its units of noise.

    Raises:
        DataError: if the question does not fit even with the least noise.
    """

    def size(n: int) -> int:
        draft = plan.build(n)
        return count(f"{draft.prompt}\n{draft.prefix}") + new

    # Stop within half a per cent of the length, because the last steps are the most expensive.
    n = largest(size, length, least=plan.least, most=plan.most, slack=max(8, length // 200))
    if n is None:
        raise DataError(
            f"length={length} cannot hold {task}, which takes {size(plan.least)} tokens with "
            f"{new} for the answer: raise it"
        )
    found = asdict(plan.build(n))
    found["answer_prefix"] = found.pop("prefix")
    return Item(suite=suite, task=task, length=length, new_tokens=new, **found), n


def questions(
    count: Count,
    plan: Callable[[int], Plan],
    *,
    suite: str,
    task: str,
    length: int,
    n: int,
    new: int,
) -> list[Item]:
    """Return n questions that fit into a length; question i is made by `plan(i)`.

    Raises:
        DataError: if a question does not fit even with the least noise.
    """
    return [
        fitted(count, plan(i), suite=suite, task=task, length=length, new=new)[0] for i in range(n)
    ]


def hide(
    heading: str, units: Sequence[str], needles: Sequence[str], slots: Sequence[int], gap: str
) -> tuple[str, tuple[tuple[int, int], ...], tuple[float, ...]]:
    """Return a text with needle i before unit `slots[i]`, and the spans and depths of needles.

    Spans and depths are in the order of the needles. Needles in one slot keep their order.

    Example:
        >>> from metafocus.evals.draft import hide
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
