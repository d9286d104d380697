"""Scored answers: one cell for each task and length, with intervals and depths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from metafocus.errors import DataError
from metafocus.evals.intervals import wilson
from metafocus.evals.items import Item
from metafocus.evals.scorers import babilong_official, lm_eval_substring, reference_hits

# The depths are scored by the first one.
SCORERS: dict[str, tuple[str, ...]] = {
    "babilong": ("babilong_official", "lm_eval_substring"),
    "ruler": ("string_match_all",),
    "ruler qa": ("string_match_part",),
    "helmet": ("string_match_all",),
    "nolima": ("string_match_all",),
}


@dataclass(frozen=True)
class Score:
    """A mean from 0 to 1 over n answers, with its 95 % Wilson interval."""

    scorer: str
    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Cell:
    """One task at one length.

    `by_depth` has (mean, n) for each part of the context, or None for a part without evidence.
    """

    suite: str
    task: str
    length: int
    scores: tuple[Score, ...]
    by_depth: tuple[tuple[float, int] | None, ...]


def score(item: Item, output: str) -> dict[str, float]:
    """Return the score of one answer by each scorer, from 0 to 1.

    Example:
        >>> from metafocus.evals.items import Item
        >>> from metafocus.evals.results import score
        >>> item = Item("ruler", "vt", 1000, "...", "?", "A B", ("A", "B"), 30)
        >>> score(item, "only a")
        {'string_match_all': 0.5}
    """
    if item.suite == "babilong":
        target = item.references[0]
        official = babilong_official(output, target, item.question, item.labels)
        return {
            "babilong_official": float(official),
            "lm_eval_substring": float(lm_eval_substring(output, target)),
        }
    hits = reference_hits(output, item.references)
    if (item.suite, item.task) == ("ruler", "qa"):
        return {"string_match_part": float(any(hits))}
    return {"string_match_all": sum(hits) / len(hits)}


def depth_points(item: Item, output: str) -> list[tuple[float, float]]:
    """Return (depth, score) for each needle, or one pair with the mean depth of all evidence."""
    if not item.depths:
        return []
    if item.aligned:
        hits = reference_hits(output, item.references)
        return [(d, float(hit)) for d, hit in zip(item.depths, hits, strict=True)]
    first = next(iter(score(item, output).values()))
    return [(sum(item.depths) / len(item.depths), first)]


def cells(items: Sequence[Item], outputs: Sequence[str], bins: int = 10) -> list[Cell]:
    """Score the answers and average them for each task and length.

    Raises:
        DataError: if the numbers of items and outputs differ, or if there is no bin.
    """
    if len(items) != len(outputs) or bins < 1:
        raise DataError(
            f"{len(items)} items, {len(outputs)} outputs, bins={bins}: pass one output for each "
            "item and at least one bin"
        )
    groups: dict[tuple[str, str, int], list[tuple[Item, str]]] = defaultdict(list)
    for item, output in zip(items, outputs, strict=True):
        groups[item.suite, item.task, item.length].append((item, output))
    return [_cell(*key, pairs, bins) for key, pairs in groups.items()]


def _cell(suite: str, task: str, length: int, pairs: list[tuple[Item, str]], bins: int) -> Cell:
    verdicts = [score(item, output) for item, output in pairs]
    scores = []
    for name in verdicts[0]:
        mean = sum(verdict[name] for verdict in verdicts) / len(verdicts)
        scores.append(Score(name, mean, *wilson(mean, len(verdicts)), len(verdicts)))
    parts: list[list[float]] = [[] for _ in range(bins)]
    for item, output in pairs:
        for depth, value in depth_points(item, output):
            parts[min(int(depth * bins), bins - 1)].append(value)
    by_depth = tuple((sum(part) / len(part), len(part)) if part else None for part in parts)
    return Cell(suite, task, length, tuple(scores), by_depth)


@dataclass(frozen=True)
class Average:
    """The mean over tasks at one length, of the scorer that comes first."""

    length: int
    mean: float
    tasks: int


def averages(found: Sequence[Cell]) -> list[Average]:
    """Return the mean over tasks at each length, each task with the same weight.

    Example:
        >>> from metafocus.evals.results import Cell, Score, averages
        >>> rows = [Cell("ruler", t, 4096, (Score("s", m, 0, 1, 9),), ()) for t, m in
        ...         (("vt", 1.0), ("qa", 0.5))]
        >>> averages(rows)
        [Average(length=4096, mean=0.75, tasks=2)]
    """
    groups: dict[int, list[float]] = defaultdict(list)
    for cell in found:
        groups[cell.length].append(cell.scores[0].mean)
    return [Average(n, sum(row) / len(row), len(row)) for n, row in sorted(groups.items())]


def effective_length(found: Sequence[Average], threshold: float) -> int | None:
    """Return the largest length up to which every average is at least the threshold, from 0 to 1.

    Example:
        >>> from metafocus.evals.results import Average, effective_length
        >>> rows = [Average(4096, 0.95, 2), Average(8192, 0.9, 2), Average(16384, 0.7, 2)]
        >>> effective_length(rows, 0.856), effective_length(rows, 0.99)
        (8192, None)
    """
    best = None
    for row in found:
        if row.mean < threshold:
            break
        best = row.length
    return best


def as_record(cell: Cell) -> dict[str, Any]:
    """Return a cell for JSON, with each score under the name of its scorer."""
    found = asdict(cell)
    found["scores"] = {score["scorer"]: score for score in found["scores"]}
    return found
