"""What the paper claims, as differences between cells, and what this run says to each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from effects import (
    FEWEST_SEEDS,
    Effect,
    Results,
    Run,
    accuracy,
    as_trained,
    between,
    effect,
    everything,
    interval,
    log_mass,
    loss,
    mass,
    places,
    trained,
)
from protocol import BIDIRECTIONAL, CAUSAL, CAUSAL_INNER, FOCUSFT, Scale

VERDICTS = ("supported", "contradicted", "undecided", "not run")


@dataclass(frozen=True)
class Claim:
    """A statement about one number, and what was found.

    Attributes:
        text: what is claimed.
        published: the paper's number for it; "-" where it has none.
        found: the number with its interval; None if nothing of it has run.
        beyond: the claim holds if the number is above it (with `above=False`: below it).
        above: see there.
        show: how the number is written.
        fewest: with fewer seeds nothing is decided. 1 where nothing was trained.
    """

    text: str
    found: Effect | None
    published: str = "-"
    beyond: float = 0.0
    above: bool = True
    show: Callable[[Effect], str] = lambda found: found.difference
    fewest: int = FEWEST_SEEDS

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`: decided only if the interval lies on one side of the bound."""
        found = self.found
        if found is None:
            return "not run"
        if found.seeds < self.fewest or not math.isfinite(found.low + found.high):
            return "undecided"
        if found.low > self.beyond:
            return "supported" if self.above else "contradicted"
        if found.high < self.beyond:
            return "contradicted" if self.above else "supported"
        return "undecided"


PAIRS = {
    "FocuSFT against causal fine-tuning": (FOCUSFT, CAUSAL),
    "the mask alone": (BIDIRECTIONAL, CAUSAL),
    "the inner loop alone, causal mask": (CAUSAL_INNER, CAUSAL),
    "the inner loop, bidirectional mask": (FOCUSFT, BIDIRECTIONAL),
}


def claims(scale: Scale, results: Results, base: Run) -> list[Claim]:
    """Return the paper's claims with their evidence; accuracy and attention as deployed."""
    return [*gains(scale, results), *attention(results, base), control(results)]


def gains(scale: Scale, results: Results) -> list[Claim]:
    """FocuSFT raises accuracy; and, for what accuracy is too coarse to see, lowers the loss."""
    found = []
    for place, where in places(scale).items():
        found.append(
            Claim(
                f"FocuSFT raises accuracy: {place}",
                effect(results, FOCUSFT, CAUSAL, accuracy("deployed", *where)),
                published="up to +0.14 (BABILong, 7B)" if place.endswith("longer") else "-",
            )
        )
    for pair, (one, other) in PAIRS.items():
        found.append(
            Claim(
                f"Lower answer loss, all tasks and lengths: {pair}",
                effect(results, one, other, loss("deployed", *everything(scale))),
                above=False,
            )
        )
    return found


def factor(found: Effect) -> str:
    """Write the decimal logarithm of a factor as the factor."""
    return f"a factor of {found.factor}"


def attention(results: Results, base: Run) -> list[Claim]:
    """The sink falls by two orders and the engagement triples, in the paper through training."""
    sink = "sink_mass"
    untrained = log_mass("deployed", sink)(base) - log_mass("training mask", sink)(base)
    engaged = log_mass("deployed", "context_engagement")
    after = [engaged(run) - engaged(base) for run in trained(results, FOCUSFT).values()]
    return [
        Claim(
            "The sink falls a hundredfold, causal fine-tuning to FocuSFT, each as it was trained",
            between(
                results,
                (CAUSAL, log_mass(as_trained(CAUSAL), sink)),
                (FOCUSFT, log_mass(as_trained(FOCUSFT), sink)),
            ),
            published="529-fold",
            beyond=2.0,
            show=factor,
        ),
        Claim(
            "... and that takes training: before it, the mask lowers the sink less than a "
            "hundredfold",
            interval(untrained[None]),
            beyond=2.0,
            above=False,
            show=factor,
            fewest=1,
        ),
        Claim(
            "The sink falls a hundredfold, causal fine-tuning to FocuSFT, as deployed",
            between(
                results,
                (CAUSAL, log_mass("deployed", sink)),
                (FOCUSFT, log_mass("deployed", sink)),
            ),
            beyond=2.0,
            show=factor,
        ),
        Claim(
            "The sink is gone, not moved: the largest column falls too, as deployed",
            effect(results, FOCUSFT, CAUSAL, mass("deployed", "max_column_mass")),
            above=False,
        ),
        Claim(
            "Training by FocuSFT triples the context engagement, as deployed",
            interval(np.stack(after)) if after else None,
            published="3-fold",
            beyond=math.log10(3),
            show=factor,
        ),
        Claim(
            "FocuSFT raises the attention on the evidence, as deployed",
            effect(results, FOCUSFT, CAUSAL, mass("deployed", "needle_mass")),
        ),
    ]


def control(results: Results) -> Claim:
    """Own fast weights help more than those of another sample of the task."""
    rows = [
        np.array(run["control"]["another's"]) - np.array(run["control"]["own"])
        for run in trained(results, FOCUSFT).values()
    ]
    return Claim(
        "Fast weights adapt to their own sample: another sample's give a higher answer loss, with "
        "the training mask",
        interval(np.stack(rows)) if rows else None,
    )
