"""Many trials at many questions: pass@k with intervals."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from metafocus.errors import DataError
from metafocus.evals.agentic.attempt import Attempt, Tool, play
from metafocus.evals.agentic.endpoints import Endpoint
from metafocus.evals.agentic.passk import pass_at_k
from metafocus.evals.agentic.questions import Choice
from metafocus.evals.intervals import wilson


@dataclass(frozen=True)
class PassRate:
    """Mean pass@k over the questions, from 0 to 1, with its 95 % Wilson interval.

    The interval is over questions: it shows how much the mean may differ for another set of as many
    questions. For k < n the pass@k of a question may be between 0 and 1. The interval is then too
    wide rather than too narrow.
    """

    k: int
    mean: float
    low: float
    high: float
    questions: int


@dataclass(frozen=True)
class Trial:
    """The results; `attempts[i]` has the trials at question i."""

    rates: tuple[PassRate, ...]
    attempts: tuple[tuple[Attempt, ...], ...]

    def summary(self) -> dict[str, object]:
        """Return the rates, how trials ended, and how often the tool was called, for JSON."""
        every = [attempt for row in self.attempts for attempt in row]
        ends = [attempt.ended for attempt in every]
        runs = [run for attempt in every for run in attempt.runs]
        return {
            "pass_at_k": {str(rate.k): asdict(rate) for rate in self.rates},
            "ended": {end: ends.count(end) for end in sorted(set(ends))},
            "tool": {
                "calls": len(runs),
                "not_run": runs.count(None),
                "failed": sum(run is not None and run["code"] != 0 for run in runs),
                "stopped": sum(run is not None and bool(run["stopped"]) for run in runs),
            },
        }


def evaluate(
    endpoint: Endpoint,
    questions: Sequence[Choice],
    *,
    samples: int = 1,
    ks: Sequence[int] = (1,),
    tool: Tool | None = None,
    calls: int = 5,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Trial:
    """Ask each question `samples` times, and estimate pass@k without bias.

    Trial j at question i has a seed of its own, which depends neither on the number of questions
    nor on the number of samples.

    Args:
        endpoint: the endpoint that replies.
        questions: the questions.
        samples: the number of trials at each question.
        ks: the values of k, at most `samples`.
        tool: such as `run_python`; None for no tool.
        calls: the largest number of calls of the tool in one trial.
        seed: the seed of all trials.
        progress: called with 1 after each trial.

    Raises:
        DataError: if there are no questions, if `samples` is below 1, or if a k is not in
            1..samples.

    Example:
        >>> from metafocus.evals.agentic import evaluate, science
        >>> trial = evaluate(lambda messages, seed: "Answer: A", science(12), samples=2)
        >>> trial.rates[0].questions, trial.summary()["ended"]
        (12, {'answered': 24})
    """
    if not questions or samples < 1 or not ks or not all(1 <= k <= samples for k in ks):
        raise DataError(
            f"{len(questions)} questions, samples={samples}, ks={tuple(ks)}: needs at least one of "
            "each and 1 <= k <= samples"
        )
    found: list[tuple[Attempt, ...]] = []
    for i, question in enumerate(questions):
        row = []
        for j in range(samples):
            own = random.Random(f"agentic {seed} {i} {j}").getrandbits(40)
            row.append(play(endpoint, question, tool=tool, calls=calls, seed=own))
            if progress is not None:
                progress(1)
        found.append(tuple(row))
    return Trial(tuple(_rate(found, k) for k in dict.fromkeys(ks)), tuple(found))


def _rate(attempts: Sequence[Sequence[Attempt]], k: int) -> PassRate:
    shares = [pass_at_k(len(row), sum(e.correct for e in row), k) for row in attempts]
    mean = sum(shares) / len(shares)
    return PassRate(k, mean, *wilson(mean, len(shares)), len(shares))
