"""Many trials at many questions: pass@k with intervals."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from metafocus.errors import DataError
from metafocus.evals.agentic.attempt import Attempt, Tool, play
from metafocus.evals.agentic.endpoints import Endpoint
from metafocus.evals.agentic.passk import pass_at_k
from metafocus.evals.agentic.questions import Choice
from metafocus.evals.asking import ask_all
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
    concurrency: int = 1,
    done: Mapping[tuple[int, int], Attempt] | None = None,
    each: Callable[[int, int, Attempt], None] | None = None,
) -> Trial:
    """Ask each question `samples` times, and estimate pass@k without bias.

    Trial j at question i has a seed of its own, which depends neither on the number of questions
    nor on the number of samples. One request that fails does not stop the others.

    Args:
        endpoint: the endpoint that replies.
        questions: the questions.
        samples: the number of trials at each question.
        ks: the values of k, at most `samples`.
        tool: such as `run_python`; None for no tool.
        calls: the largest number of calls of the tool in one trial.
        seed: the seed of all trials.
        concurrency: the largest number of trials at the same time; 1 for a local model.
        done: attempts that are known already, by the numbers of the question and the sample.
        each: called after each trial with these two numbers and the attempt.

    Raises:
        DataError: if there are no questions, if `samples` is below 1, if a k is not in 1..samples,
            or if requests failed; the other trials have then been passed to `each`.

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
    known = dict(done or {})
    pairs = [(i, j) for i in range(len(questions)) for j in range(samples)]

    def ask(pair: tuple[int, int]) -> Attempt:
        own = random.Random(f"agentic {seed} {pair[0]} {pair[1]}").getrandbits(40)
        return play(endpoint, questions[pair[0]], tool=tool, calls=calls, seed=own)

    def keep(pair: tuple[int, int], attempt: Attempt) -> None:
        known[pair] = attempt
        if each is not None:
            each(*pair, attempt)

    missing = [pair for pair in pairs if pair not in known]
    ask_all(missing, ask, keep, concurrency=concurrency)
    found = [tuple(known[i, j] for j in range(samples)) for i in range(len(questions))]
    return Trial(tuple(_rate(found, k) for k in dict.fromkeys(ks)), tuple(found))


def _rate(attempts: Sequence[Sequence[Attempt]], k: int) -> PassRate:
    shares = [pass_at_k(len(row), sum(e.correct for e in row), k) for row in attempts]
    mean = sum(shares) / len(shares)
    return PassRate(k, mean, *wilson(mean, len(shares)), len(shares))
