"""Many requests to an endpoint, some at the same time; one that fails does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from metafocus.checks import whole
from metafocus.errors import DataError, MetafocusError

Job = TypeVar("Job")
Result = TypeVar("Result")
_GIVE_UP = 5  # failures in a row: the server is gone


def ask_all(
    jobs: Sequence[Job],
    ask: Callable[[Job], Result],
    each: Callable[[Job, Result], None],
    *,
    concurrency: int = 1,
) -> None:
    """Ask for every job, and pass on each result as soon as it is there.

    A request that fails does not stop the others. `each` is called in this thread, so it may write
    to a file. After 5 failures in a row nothing more is asked.

    Args:
        jobs: what is asked.
        ask: asks for one job; it is called in several threads if `concurrency` is above 1.
        each: called with a job and its result.
        concurrency: the largest number of requests at the same time.

    Raises:
        DataError: if requests failed, after the others have been answered.

    Example:
        >>> from metafocus.evals.asking import ask_all
        >>> ask_all([1, 2], lambda n: n + 1, lambda n, result: print(n, result))
        1 2
        2 3
    """
    whole("concurrency", concurrency, 1, error=DataError)
    failed: list[MetafocusError] = []
    in_a_row = 0
    outcomes = _one_by_one(jobs, ask) if concurrency == 1 else _together(jobs, ask, concurrency)
    for job, outcome in outcomes:
        if isinstance(outcome, MetafocusError):
            failed.append(outcome)
            in_a_row += 1
            if in_a_row == _GIVE_UP:
                break
        else:
            in_a_row = 0
            each(job, outcome)
    if failed:
        gone = " in a row" if in_a_row == _GIVE_UP else ""
        raise DataError(
            f"{len(failed)} requests failed{gone}, the last with: {failed[-1]}. All other answers "
            "are kept: run the same command again to ask for the missing ones"
        )


def _outcome(ask: Callable[[Job], Result], job: Job) -> Result | MetafocusError:
    try:
        return ask(job)
    except MetafocusError as error:
        return error


def _one_by_one(
    jobs: Sequence[Job], ask: Callable[[Job], Result]
) -> Iterator[tuple[Job, Result | MetafocusError]]:
    """Ask in this thread: a local model, and a request that Ctrl-C interrupts at once."""
    for job in jobs:
        yield job, _outcome(ask, job)


def _together(
    jobs: Sequence[Job], ask: Callable[[Job], Result], concurrency: int
) -> Iterator[tuple[Job, Result | MetafocusError]]:
    waiting = iter(jobs)
    running: dict[Future[Result | MetafocusError], Job] = {}
    pool = ThreadPoolExecutor(concurrency)
    try:
        while True:
            while len(running) < concurrency and (job := next(waiting, None)) is not None:
                running[pool.submit(_outcome, ask, job)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                yield running.pop(future), future.result()
    finally:
        # A thread that waits for a reply cannot be stopped, but nothing new is asked.
        pool.shutdown(wait=False, cancel_futures=True)
