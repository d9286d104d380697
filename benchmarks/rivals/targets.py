"""What a workload promises, as data: the report computes whether it is met."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Target(NamedTuple):
    """`ours` needs at most `at_most` times what `other` needs.

    Attributes:
        text: the promise in words.
        ours: label of a contender.
        other: label of another, or "fastest" or "leanest": of the right ones that are not ours,
            that with the least time, or the least of the quantity.
        at_most: the largest allowed ratio; 1/6 means six times as fast.
        quantity: "time", "process_bytes" or "tensor_bytes".
        case: what the parameters of a case must contain.
    """

    text: str
    ours: str
    other: str
    at_most: float
    quantity: str = "time"
    case: Mapping[str, Any] = MappingProxyType({})


class Verdict(NamedTuple):
    """One target at one case and number of threads; `value` is None where it was not measured."""

    target: Target
    case: dict[str, Any]
    threads: int
    other: str
    value: float | None
    cpu: float | None = None
    wall: float | None = None
    """The ratios of CPU times and of times of the clock, for a target on time."""

    @property
    def met(self) -> bool:
        """Whether the measured ratio is within the target."""
        return self.value is not None and self.value <= self.target.at_most

    def words(self) -> str:
        """Return "met", or by how much it is missed."""
        if self.value is None:
            return "not measured"
        if self.met:
            return "met"
        by = self.value / self.target.at_most - 1
        return f"missed by {by:.1%}" if by >= 5e-4 else "missed by less than 0.1%"


def verdicts(target: Target, runs: list[dict[str, Any]]) -> list[Verdict]:
    """Judge a target on every run (a case at a number of threads) that it speaks of."""
    chosen = [r for r in runs if target.case.items() <= r["case"].items()]
    found = []
    for run in chosen:
        rows, other = run["rows"], target.other
        # A thread that waits for another one spins, and so has CPU time.
        clock = "cpu" if run["threads"] == 1 else "wall"
        quantity = clock if target.quantity == "time" else target.quantity
        if other in ("fastest", "leanest"):
            key = clock if other == "fastest" else quantity
            right = [n for n, r in rows.items() if r["verdict"] == "right" and r.get(key)]
            right = [n for n in right if not n.startswith("metafocus")]
            if right:
                other = min(right, key=lambda n: _typical(rows[n][key]))
        value, *both = (ratio(rows, target.ours, other, q) for q in (quantity, "cpu", "wall"))
        times = both if target.quantity == "time" else ()
        # Memory is measured once, on one thread.
        if value is not None or times or run["threads"] == 1:
            found.append(Verdict(target, run["case"], run["threads"], other, value, *times))
    return found


def is_right(row: dict[str, Any]) -> bool:
    """Return whether a contender gave the right gradient, or stands there for its cost alone."""
    return row["verdict"] in ("right", "baseline")


def ratio(rows: dict[str, Any], ours: str, other: str, quantity: str) -> float | None:
    """Return the median of per-repetition ratios, or the ratio of two memories."""
    if not all(n in rows and is_right(rows[n]) for n in (ours, other)):
        return None
    a, b = rows[ours].get(quantity), rows[other].get(quantity)
    if not a or not b:
        return None
    if isinstance(a, list):
        return statistics.median(x / y for x, y in zip(a, b, strict=True))
    return a / b if b else None


def _typical(value: Any) -> float:
    return statistics.median(value) if isinstance(value, list) else value
