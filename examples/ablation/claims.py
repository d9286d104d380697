"""What the literature claims, as differences between cells, and what this run says to each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from effects import Effect, Measure, Results, accuracy, effect, interval, mass, where
from scale import BIDIRECTIONAL, CAUSAL, CAUSAL_INNER, FOCUSFT, Cell, Scale

SINK, SINK_TIMES = 0.1, 10.0  # of a layer's attention, and of an equal share: a first-token sink


@dataclass(frozen=True)
class Claim:
    """A statement, the difference that would bear it out, and what was found."""

    text: str
    about: str
    effect: Effect | None
    up: bool
    blocked: str = ""

    @property
    def verdict(self) -> str:
        """One of supported, contradicted, undecided."""
        if self.effect is None or self.blocked:
            return "undecided"
        return self.effect.verdict(self.up)


PAIRS = {
    "FocuSFT against causal fine-tuning": (FOCUSFT, CAUSAL),
    "the inner loop, with the bidirectional mask": (FOCUSFT, BIDIRECTIONAL),
    "the inner loop, with the causal mask": (CAUSAL_INNER, CAUSAL),
    "the bidirectional mask, without an inner loop": (BIDIRECTIONAL, CAUSAL),
}


def claims(scale: Scale, results: Results, base: dict) -> list[Claim]:
    """Return every claim that this experiment could decide, with its evidence."""
    found = []
    for pair, (one, other) in PAIRS.items():
        for place, (tasks, lengths) in where(scale).items():
            if lengths:
                found.append(
                    Claim(
                        f"Raises accuracy on {place} ({pair})",
                        "accuracy",
                        effect(results, one, other, accuracy("deployed", tasks, lengths)),
                        up=True,
                    )
                )
    blocked = "" if has_sink(scale, base) else "the base has no first-token sink to remove"
    for pair, (one, other) in PAIRS.items():
        for name, text, up in (
            ("sink_mass", "Lowers the attention of answers on the first token", False),
            ("context_engagement", "Raises the attention of answers on the context", True),
            ("needle_mass", "Raises the attention of answers on the evidence", True),
        ):
            found.append(
                Claim(
                    f"{text} ({pair})",
                    "attention",
                    effect(results, one, other, mass("deployed", name)),
                    up,
                    blocked if name == "sink_mass" else "",
                )
            )
    found.append(
        Claim(
            "The sink is gone, not moved: the largest column falls too (FocuSFT against causal "
            "fine-tuning, each as it was trained)",
            "attention",
            between(results, (FOCUSFT, "with fast weights"), (CAUSAL, "training mask")),
            up=False,
            blocked=blocked,
        )
    )
    found.append(
        Claim(
            "Fast weights adapt to their own content: they help more than another sample's",
            "control",
            specific(results, FOCUSFT),
            up=True,
        )
    )
    return found


def between(results: Results, one: tuple[Cell, str], other: tuple[Cell, str]) -> Effect | None:
    """Return the difference of the largest column between two cells, each in its own setting."""
    seeds = sorted(set(results.get(one[0].name, {})) & set(results.get(other[0].name, {})))
    read: dict[int, Measure] = {
        i: mass(way, "max_column_mass") for i, (_, way) in enumerate((one, other))
    }
    rows = [[read[0](results[one[0].name][s]) - read[1](results[other[0].name][s])] for s in seeds]
    return interval(np.array(rows)) if rows else None


def specific(results: Results, cell: Cell) -> Effect | None:
    """Return how much lower the answer loss is with own fast weights than with another's."""
    controls = [run["control"] for run in results.get(cell.name, {}).values()]
    rows = [[c["another's"] - c["own"]] for c in controls]
    return interval(np.array(rows)) if rows else None


def has_sink(scale: Scale, base: dict) -> bool:
    """Say whether some layer of the base looks at the first token far more than at others."""
    return max(base["attention"]["deployed"]["sink_by_layer"]) > max(
        SINK, SINK_TIMES / scale.length
    )
