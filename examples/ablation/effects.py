"""Differences between cells, paired by seed and by question, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scale import Cell, Scale

DRAWS = 4000
FEWEST_SEEDS = 3  # below, nothing is decided
Results = dict[str, dict[int, dict[str, Any]]]  # cell name -> seed -> measurements
Measure = Callable[[dict[str, Any]], np.ndarray]  # of one run -> one value a question, or one


@dataclass(frozen=True)
class Effect:
    """A mean difference with its 95 % interval, over so many paired seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def text(self) -> str:
        """Like `+0.031 [-0.010, +0.072]`."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def verdict(self, up: bool) -> str:
        """Say whether a claim that the difference is positive (or negative) is borne out."""
        if self.seeds < FEWEST_SEEDS or not np.isfinite([self.low, self.high]).all():
            return "undecided"
        if self.low > 0:
            return "supported" if up else "contradicted"
        if self.high < 0:
            return "contradicted" if up else "supported"
        return "undecided"


def effect(results: Results, one: Cell, other: Cell, measure: Measure) -> Effect | None:
    """Return the mean of `measure` under `one` minus `other`, or None without a paired seed.

    Both seeds and questions are drawn anew, the same for the two cells: runs of one seed share
    data, order and initial weights, and all runs answer the same questions.
    """
    seeds = sorted(set(results.get(one.name, {})) & set(results.get(other.name, {})))
    if not seeds:
        return None
    rows = [measure(results[one.name][s]) - measure(results[other.name][s]) for s in seeds]
    return interval(np.stack([np.atleast_1d(row) for row in rows]))


def interval(values: np.ndarray) -> Effect:
    """Return the mean of `[seeds, questions]` and percentiles over draws of both."""
    rng = np.random.default_rng(0)
    seeds, questions = values.shape
    s = rng.integers(seeds, size=(DRAWS, seeds))
    q = rng.integers(questions, size=(DRAWS, questions))
    # The mean over drawn seeds and questions is bilinear in how often each was drawn.
    by_seed = np.stack([np.bincount(row, minlength=seeds) for row in s]) / seeds
    by_question = np.stack([np.bincount(row, minlength=questions) for row in q]) / questions
    means = np.einsum("ds,sq,dq->d", by_seed, values, by_question)
    low, high = np.percentile(means, [2.5, 97.5])
    return Effect(float(values.mean()), float(low), float(high), seeds)


def accuracy(way: str, tasks: tuple[str, ...], lengths: tuple[int, ...]) -> Measure:
    """Return what reads whether each question was answered, of some tasks and lengths."""

    def read(run: dict[str, Any]) -> np.ndarray:
        scores = run["scores"][way]
        return np.array([r for t in tasks for n in lengths for r in scores[t][str(n)]["right"]])

    return read


def loss(way: str, tasks: tuple[str, ...], lengths: tuple[int, ...]) -> Measure:
    """Return what reads the mean answer loss of some tasks and lengths."""

    def read(run: dict[str, Any]) -> np.ndarray:
        scores = run["scores"][way]
        return np.array(np.mean([scores[t][str(n)]["loss"] for t in tasks for n in lengths]))

    return read


def mass(way: str, name: str) -> Measure:
    """Return what reads an attention measure, the mean over layers."""
    return lambda run: np.array(run["attention"][way][name])


def where(scale: Scale) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Return what is asked: tasks and lengths that were trained on, and such that were not."""
    longer = tuple(n for n in scale.lengths if n > scale.length)
    trained = (scale.length,)
    return {
        "trained tasks at the trained length": (scale.trained, trained),
        "trained tasks at longer lengths": (scale.trained, longer),
        "held-out tasks at the trained length": (scale.held_out, trained),
        "held-out tasks at longer lengths": (scale.held_out, longer),
    }
