"""The same problem under many estimators: how wrong, how slow and how large each one is."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metafocus.cells import run_cells
from metafocus.checks import whole
from metafocus.comparison.averages import row
from metafocus.comparison.axes import settings, touches_solver
from metafocus.comparison.contenders import follows_solver
from metafocus.comparison.jobs import Job, Work, at_seed
from metafocus.comparison.reference import title
from metafocus.comparison.report import Comparison, environment
from metafocus.engine import MetaLoss
from metafocus.engine.checked_parts import check_estimator
from metafocus.errors import ProblemError
from metafocus.estimators import Estimator
from metafocus.problem import Problem, check_params, refuse_empty
from metafocus.types import Episode, Params, Solver


def compare(
    problem: Problem,
    outer: Params | Callable[[int], Params],
    episode: Episode | Callable[[int], Episode],
    *,
    solver: Solver,
    estimators: Mapping[str, Estimator],
    reference: str | Estimator | Params | Callable[..., Any],
    others: Mapping[str, MetaLoss | Any] | None = None,
    over: Mapping[str, Sequence[Any]] | None = None,
    seeds: int = 1,
    repeats: int = 3,
    folder: str | Path | None = None,
    executor: Any = None,
    fresh_process: bool = False,
) -> Comparison:
    """Compute one hypergradient by every estimator and report how they differ and what they cost.

    `problem.init` should return the same start at every call under the same torch seed. Under each
    seed the reference and every contender see the same random numbers.

    Args:
        problem: the bilevel problem.
        outer: where to take the hypergradient, or a function of the seed that returns it.
        episode: support and query, or a function of the seed that returns them.
        solver: the inner optimiser, the same for all.
        estimators: what to compare, by name.
        reference: what to compare with: a name of `estimators` or `others`, another estimator, the
            exact hypergradient itself, "central differences" (the step is chosen for each
            tensor, and their error is reported), or a function `(outer, episode)` or
            `(outer, episode, solver)` that returns the exact hypergradient. `over` does not
            change an estimator that is named here.
        others: contenders that are not estimators, by name: a meta loss of the same problem, such
            as `mf.algorithms.Evolution(...)`; a hypergradient, such as `mf.compiled(...)`; a
            single-loop algorithm, whose `step` is called `solver.steps` times with a fixed `outer`;
            or a function of the solver that returns one of these, which `over` needs if it
            changes the solver.
        over: what to vary: lists of values by field, such as `{"solver.steps": [1, 2, 4]}`,
            `{"estimator.solve.damping": [...]}` (of all estimators that have it), or
            `{"truncated.last": [...]}` (of the one with that name). `{"tasks": [...]}` takes so
            many of the tasks that are stacked in `episode`, drawn with the seed; contenders are
            those of one task, and their mean is taken. Several axes span a grid.
        seeds: how many hypergradients to draw of each, under torch seeds 0, 1, ...; generators of
            an estimator are seeded anew for each. More than one gives 95 % intervals.
        repeats: how often each is timed. The timed runs of one seed take turns, unless `folder` or
            `executor` makes each a cell of its own.
        folder: where finished cells are kept by their content, as by `mf.sweep`: a comparison with
            another estimator, value or seed computes only what is new.
        executor: a `concurrent.futures.Executor`, as for `mf.sweep`. Times are then those of a
            machine that does several things at once.
        fresh_process: measure the peak memory of the process instead of that of tensors, each in
            a process of its own (Linux, no CUDA).

    Returns:
        A `Comparison` with `.table()`, `.plot(path)`, `.pareto(path)`, `.to_json(path)`,
        `.to_pandas()`, `.to_latex()`, `.rows`.

    Raises:
        ProblemError: for an unknown or non-finite reference, for an axis that nothing has, and if
            a cell fails.

    Example:
        >>> import torch, metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> result = mf.compare(
        ...     mf.Problem(loss, loss),
        ...     {"w": torch.ones(2)}, mf.Episode(torch.zeros(2), torch.ones(2)),
        ...     solver=mf.SGD(0.1, steps=3),
        ...     estimators={"full": mf.Unrolled(), "first-order": mf.FirstOrder()},
        ...     reference="full", over={"solver.steps": [1, 3]})
        >>> [(row["solver.steps"], row["name"], row["verdict"]) for row in result.rows[:2]]
        [(1, 'full', 'exact'), (1, 'first-order', 'right direction, wrong length')]
    """
    for name, value in (("repeats", repeats), ("seeds", seeds)):
        whole(name, value, 1)
    start = at_seed("outer", outer, 0)
    check_params(start, "outer", "outer parameters")
    refuse_empty(start, "compare")
    if not isinstance(others, Mapping | None):
        raise ProblemError(
            "others must be a dict of meta losses by name, such as {'mine': meta_loss}, got "
            f"{type(others).__name__}."
        )
    others = dict(others or {})
    _check_contenders(estimators, others)
    heading = title(reference, estimators, others, start)
    grid = settings(over, solver, estimators)
    _check_others(others, over, solver)
    groups = [
        [Job(setting, name, seed) for name in (*estimators, *others)]
        for setting in grid
        for seed in range(seeds)
    ]
    work = Work(
        *(problem, outer, episode, estimators, others),
        *(reference, heading, repeats, fresh_process),
        folder=None if folder is None else Path(folder),
    )
    if folder is None and executor is None:
        records = [work.run(group) for group in groups]
    else:
        records = _swept(work, groups, executor)
    dtype = next(iter(start.values())).dtype
    measured = list(zip(itertools.chain(*groups), itertools.chain(*records), strict=True))
    rows = []
    for setting in grid:
        here = [(job, record) for job, record in measured if job.setting is setting]
        for name in (*estimators, *others):
            mine = [record for job, record in here if job.name == name]
            rows.append(row(name, setting.labels, mine, dtype))
    return Comparison(
        rows,
        heading,
        environment(dtype),
        measured[0][1]["inner_losses"] if len(grid) == 1 else [],
        {axis: list(dict.fromkeys(s.labels[axis] for s in grid)) for axis in grid[0].labels},
        _setting(solver, over, seeds),
    )


def _swept(
    work: Work, groups: Sequence[Sequence[Job]], executor: Any
) -> list[list[dict[str, Any]]]:
    """Run the jobs as cells of a sweep: those of equal content once."""
    work = work.hashed()
    cells = [[work.cell(job) for job in group] for group in groups]
    flat = list(itertools.chain(*cells))
    jobs = dict(zip([cell["content"] for cell in flat], itertools.chain(*groups), strict=True))
    with tempfile.TemporaryDirectory() as scratch:
        folder = work.folder or Path(scratch)
        ready = dataclasses.replace(work, jobs=jobs, folder=folder)
        # A cell that failed may work now, and a comparison needs all cells.
        outcomes = run_cells(ready, flat, folder=folder, executor=executor, retry=True, code=None)
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        raise ProblemError(
            f"{len(failed)} of {len(flat)} cells failed; the first is {failed[0].cell}:\n"
            f"{failed[0].error}"
        )
    results = iter(outcome.result for outcome in outcomes)
    return [[next(results) for _ in group] for group in groups]


def _check_contenders(estimators: Any, others: Mapping[str, Any]) -> None:
    if not isinstance(estimators, Mapping) or not (estimators or others):
        raise ProblemError(
            f"estimators must be a dict of at least one, such as {{'full': mf.Unrolled()}}, got "
            f"{estimators!r}."
        )
    for name, estimator in estimators.items():
        check_estimator(f"estimators[{name!r}]", estimator)
    both = sorted(estimators.keys() & others.keys())
    if both:
        raise ProblemError(f"{both[0]!r} names an estimator and one of others: rename one.")


def _check_others(
    others: Mapping[str, Any], over: Mapping[str, Any] | None, solver: Solver
) -> None:
    axis = touches_solver(over, solver)
    for name, other in others.items():
        if axis and not follows_solver(other):
            raise ProblemError(
                f"over changes {axis}, which others[{name!r}] would not follow: give a function of "
                "the solver, such as lambda solver: mf.algorithms.Evolution(mf.bilevel(problem, "
                "solver=solver, estimator=mf.FirstOrder()), ...)."
            )


def _setting(solver: Solver, over: Mapping[str, Any] | None, seeds: int) -> str:
    """Return what a figure says of the setting."""
    axes = f" over {', '.join(over)}" if over else ""
    return f"{solver}{axes}, {seeds} seed{'s' if seeds > 1 else ''}"
