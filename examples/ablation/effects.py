"""Differences between cells, paired by seed and by chat, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from protocol import Cell, Scale

DRAWS = 4000
FEWEST_SEEDS = 3  # below, nothing is decided
Run = dict[str, Any]  # the measurements of one cell with one seed
Results = dict[str, dict[int, Run]]  # cell name -> seed -> measurements
Measure = Callable[[Run], np.ndarray]  # one value for each chat


@dataclass(frozen=True)
class Effect:
    """A mean with its 95 % interval, over so many seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def text(self) -> str:
        """Like `0.031 [-0.010, 0.072]`."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def difference(self) -> str:
        """Like `+0.031 [-0.010, +0.072]`."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def factor(self) -> str:
        """Of a decimal logarithm, like `310 [250, 390]`."""
        mean, low, high = (10**x for x in (self.mean, self.low, self.high))
        return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def interval(values: np.ndarray) -> Effect:
    """Return the mean of `[seeds, chats]` and percentiles over draws of both."""
    rng = np.random.default_rng(0)
    seeds, chats = values.shape
    s = rng.integers(seeds, size=(DRAWS, seeds))
    c = rng.integers(chats, size=(DRAWS, chats))
    # The mean over drawn seeds and chats is bilinear in how often each was drawn.
    by_seed = np.stack([np.bincount(row, minlength=seeds) for row in s]) / seeds
    by_chat = np.stack([np.bincount(row, minlength=chats) for row in c]) / chats
    means = np.einsum("ds,sc,dc->d", by_seed, values, by_chat)
    low, high = np.percentile(means, [2.5, 97.5])
    return Effect(float(values.mean()), float(low), float(high), seeds)


def level(runs: Sequence[Run], measure: Measure) -> Effect | None:
    """Return the mean of `measure` over the runs of one cell, or None without a run."""
    return interval(np.stack([measure(run) for run in runs])) if runs else None


def effect(results: Results, one: Cell, other: Cell, measure: Measure) -> Effect | None:
    """Return the mean of `measure` under `one` minus `other`, or None without a paired seed.

    Both seeds and chats are drawn anew, the same for the two cells: runs of one seed share data,
    order and initial weights, and all runs answer the same chats.
    """
    return between(results, (one, measure), (other, measure))


def between(
    results: Results, one: tuple[Cell, Measure], other: tuple[Cell, Measure]
) -> Effect | None:
    """Return the paired difference of two cells, each read in its own way."""
    a, b = (trained(results, cell) for cell, _ in (one, other))
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    return interval(np.stack([one[1](a[s]) - other[1](b[s]) for s in seeds]))


def trained(results: Results, cell: Cell) -> dict[int, Run]:
    """Return the runs of a cell by seed, without those whose training diverged."""
    return {s: run for s, run in results.get(cell.name, {}).items() if "scores" in run}


def accuracy(way: str, tasks: Sequence[str], lengths: Sequence[int]) -> Measure:
    """Return what reads the share of questions of each chat that were answered exactly."""
    return _score("right", way, tasks, lengths)


def loss(way: str, tasks: Sequence[str], lengths: Sequence[int]) -> Measure:
    """Return what reads the mean loss of the answers of each chat."""
    return _score("loss", way, tasks, lengths)


def _score(name: str, way: str, tasks: Sequence[str], lengths: Sequence[int]) -> Measure:
    def read(run: Run) -> np.ndarray:
        scores = run["scores"][way]
        chats = (chat for t in tasks for n in lengths for chat in scores[t][str(n)][name])
        return np.array([np.mean(chat) for chat in chats])

    return read


def mass(way: str, name: str) -> Measure:
    """Return what reads an attention measure of each chat, the mean over layers."""
    return lambda run: np.array(run["attention"][way][name])


def log_mass(way: str, name: str) -> Measure:
    """Return what reads its decimal logarithm: differences are then factors."""
    return lambda run: np.log10(mass(way, name)(run))


def as_trained(cell: Cell) -> str:
    """Return the way of measuring attention in which a cell was trained."""
    if cell.steps:
        return "with fast weights"
    return "deployed" if cell.mask == "causal" else "training mask"


def places(scale: Scale) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Return what is asked: tasks and lengths that were trained on, and such that were not."""
    longer = tuple(n for n in scale.chats if n > scale.length)
    return {
        "trained tasks, trained length": (scale.trained, (scale.length,)),
        "trained tasks, longer": (scale.trained, longer),
        "held-out tasks, trained length": (scale.held_out, (scale.length,)),
        "held-out tasks, longer": (scale.held_out, longer),
    }


def everything(scale: Scale) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """All tasks and all lengths."""
    return scale.tasks, tuple(scale.chats)
