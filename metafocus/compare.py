"""The same problem under many estimators: how wrong, how slow and how large each one is."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metafocus import tree
from metafocus.bilevel import adapt, bilevel, hypergrad
from metafocus.errors import NonFiniteError, NotStationaryWarning, ProblemError
from metafocus.estimators import Estimator
from metafocus.estimators.implicit import STATIONARY, gradient_norms
from metafocus.measure import peak_bytes
from metafocus.problem import Problem
from metafocus.types import Episode, MatVec, Params, Solver

COLUMNS = (
    "name",
    "relative_error",
    "cosine",
    "norm_ratio",
    "seconds",
    "peak_bytes",
    "gradient_evaluations",
    "hvp_evaluations",
    "inner_residual",
    "linear_residual",
    "verdict",
)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: one row for each estimator.

    Attributes:
        rows: dicts with the keys of `COLUMNS`; None where a quantity does not apply.
            `relative_error`, `cosine` and `norm_ratio` are against the reference hypergradient;
            `seconds` is the median; `peak_bytes` counts live tensors; `gradient_evaluations`
            counts evaluations of the inner loss, `hvp_evaluations` products with its second
            derivatives (a batch of them, as `Dense` takes, once); `inner_residual` is the inner
            gradient norm at the solution over that at the start; `linear_residual` is
            `|H x - b| / |b|`.
        reference: the name of the reference.
        environment: versions and machine.
    """

    rows: list[dict[str, Any]]
    reference: str
    environment: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """Return the rows as a table for a terminal."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"hypergradients against {self.reference}")
        heads = ("estimator", "error", "cosine", "norm", "seconds", "peak MB", "grads", "HVPs")
        for head in (*heads, "inner res.", "linear res.", "verdict"):
            table.add_column(head, justify="left" if head in ("estimator", "verdict") else "right")
        for row in self.rows:
            peak = row["peak_bytes"]
            table.add_row(
                row["name"],
                _short(row["relative_error"], ".1e"),
                _short(row["cosine"], ".4f"),
                _short(row["norm_ratio"], ".3f"),
                _short(row["seconds"], ".4f"),
                _short(None if peak is None else peak / 2**20, ".2f"),
                _short(row["gradient_evaluations"], "d"),
                _short(row["hvp_evaluations"], "d"),
                _short(row["inner_residual"], ".1e"),
                _short(row["linear_residual"], ".1e"),
                row["verdict"],
            )
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(table)
        return console.export_text().rstrip()

    def plot(self, path: str | Path) -> None:
        """Write error against time and against memory, both logarithmic, as a figure.

        An estimator without a finite hypergradient has no point in it.
        """
        from matplotlib.figure import Figure

        # Without pyplot: no window, and the back end of a notebook stays as it is.
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        floor = 1e-17
        for axis, key, unit, label in (
            (axes[0], "seconds", 1.0, "seconds (median)"),
            (axes[1], "peak_bytes", 2.0**20, "peak memory of tensors, MB"),
        ):
            errors = [(row, row["relative_error"]) for row in self.rows]
            shown = [row for row, e in errors if e is not None and math.isfinite(e)]
            for i, row in enumerate(shown):
                x, y = row[key] / unit, max(row["relative_error"], floor)
                axis.scatter([x], [y], s=45, color=f"C{i % 10}", zorder=3, label=row["name"])
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.grid(True, which="major", alpha=0.3)
        axes[0].set_ylabel(f"relative error against {self.reference}")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
        figure.savefig(path, dpi=150)

    def to_json(self, path: str | Path) -> None:
        """Write rows, reference and environment as JSON; NaN becomes null."""
        clean = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()}
            for r in self.rows
        ]
        text = {"reference": self.reference, "environment": self.environment, "rows": clean}
        Path(path).write_text(json.dumps(text, indent=2) + "\n")


def compare(
    problem: Problem,
    outer: Params,
    episode: Episode,
    *,
    solver: Solver,
    estimators: Mapping[str, Estimator],
    reference: str | Estimator | Params,
    repeats: int = 3,
) -> Comparison:
    """Compute one hypergradient by every estimator and report how they differ and what they cost.

    `problem.init` should return the same start at every call. Timings are interleaved: each
    repetition runs all estimators once.

    Args:
        problem: the bilevel problem.
        outer: where to take the hypergradient.
        episode: support and query.
        solver: the inner optimiser, the same for all.
        estimators: what to compare, by name.
        reference: what to compare with: a name of `estimators`, another estimator, or the exact
            hypergradient itself.
        repeats: how often each is timed.

    Returns:
        A `Comparison` with `.table()`, `.plot(path)`, `.to_json(path)` and `.rows`.

    Raises:
        ProblemError: for an unknown or non-finite reference.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> result = mf.compare(
        ...     mf.Problem(loss, loss, init=lambda slow: slow),
        ...     {"w": torch.ones(2)}, mf.Episode(torch.zeros(2), torch.ones(2)),
        ...     solver=mf.SGD(0.1, steps=3),
        ...     estimators={"full": mf.Unrolled(), "first-order": mf.FirstOrder()},
        ...     reference="full")
        >>> [row["verdict"] for row in result.rows]
        ['exact', 'biased']
    """
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}.")
    if not outer:
        raise ProblemError(
            "compare needs explicit outer parameters, got {}. Pass dict(model.named_parameters())."
        )
    outer = tree.detach(outer)
    runs = dict(estimators)
    if isinstance(reference, str):
        if reference not in runs:
            raise ProblemError(
                f"reference {reference!r} is not one of the estimators {sorted(runs)}."
            )
        name = reference
    elif isinstance(reference, dict):
        name = "the given hypergradient"
        shapes, expected = ({k: list(v.shape) for k, v in p.items()} for p in (reference, outer))
        if shapes != expected:
            raise ProblemError(
                f"the reference hypergradient has the shapes {shapes}, outer has {expected}."
            )
    else:
        name = str(reference)

    gradient = {
        key: hypergrad(bilevel(problem, solver=solver, estimator=estimator))
        for key, estimator in runs.items()
    }
    with warnings.catch_warnings():
        # The verdict says it.
        warnings.simplefilter("ignore", NotStationaryWarning)
        reports = {
            key: _examine(problem, outer, episode, solver, estimator)
            for key, estimator in runs.items()
        }
        if isinstance(reference, str):
            exact = reports[reference].flat
        elif isinstance(reference, dict):
            exact = _flat(reference)
        else:
            exact = _examine(problem, outer, episode, solver, reference).flat
        if exact is None or not torch.isfinite(exact).all():
            raise ProblemError(f"the reference hypergradient ({name}) is not finite.")
        alive = [key for key, report in reports.items() if report.flat is not None]
        seconds: dict[str, list[float]] = {key: [] for key in alive}
        for _ in range(repeats):
            for key in alive:
                seconds[key].append(_timed(lambda run=gradient[key]: run(outer, episode)))
    residual = inner_residual(problem, outer, episode, solver)
    rows = [_row(key, report, exact, seconds.get(key), residual) for key, report in reports.items()]
    return Comparison(rows, name, environment(_dtype(outer)))


@dataclass
class _Report:
    """What one instrumented run of one estimator showed."""

    flat: Tensor | None
    dtype: torch.dtype
    peak: int | None
    gradients: int
    products: int | None
    linear_residual: float | None
    implicit: bool


class _Tally:
    """Counts evaluations of the inner loss and products with the Hessian."""

    def __init__(self):
        self.losses = 0
        self.products = 0
        self.residual: float | None = None

    def counting(self, problem: Problem) -> Problem:
        def inner_loss(*args: Any) -> Tensor:
            self.losses += 1
            return problem.inner_loss(*args)

        return dataclasses.replace(problem, inner_loss=inner_loss)

    def watching(self, solve: Callable[[MatVec, Params], Params]) -> Any:
        def watched(matvec: MatVec, b: Params) -> Params:
            def counted(v: Params) -> Params:
                self.products += 1
                return matvec(v)

            x = solve(counted, b)
            self.residual = float(tree.norm(tree.sub(matvec(x), b)) / tree.norm(b))
            return x

        return watched


def _examine(
    problem: Problem, outer: Params, episode: Episode, solver: Solver, estimator: Any
) -> _Report:
    tally = _Tally()
    implicit = hasattr(estimator, "solve")
    watched = (
        dataclasses.replace(estimator, solve=tally.watching(estimator.solve))
        if implicit
        else estimator
    )
    plain = hypergrad(bilevel(problem, solver=solver, estimator=estimator))
    counted = bilevel(tally.counting(problem), solver=solver, estimator=watched)
    dtype = _dtype(outer)
    try:
        counted(outer, episode)
        # The first call evaluates the inner loss once more, to check the problem.
        tally.losses = tally.products = 0
        hypergrad(counted)(outer, episode)
        plain(outer, episode)
        (grads, _), peak = peak_bytes(lambda: plain(outer, episode))
    except NonFiniteError:
        return _Report(None, dtype, None, tally.losses, None, None, implicit)
    products = None
    if implicit:
        products = tally.products + 1
    elif hasattr(estimator, "last"):
        products = solver.steps if estimator.last is None else min(estimator.last, solver.steps)
    return _Report(_flat(grads), dtype, peak, tally.losses, products, tally.residual, implicit)


def _row(
    name: str, report: _Report, exact: Tensor, seconds: list[float] | None, residual: float
) -> dict[str, Any]:
    error = cosine = ratio = None
    if report.flat is not None:
        size, found = exact.norm(), report.flat.norm()
        distance = (report.flat - exact).norm()
        error = float(distance / size) if distance != 0 else 0.0
        cosine = float((report.flat @ exact) / (size * found)) if found > 0 else 0.0
        ratio = float(found / size)
    return {
        "name": name,
        "relative_error": error,
        "cosine": cosine,
        "norm_ratio": ratio,
        "seconds": statistics.median(seconds) if seconds else None,
        "peak_bytes": report.peak,
        "gradient_evaluations": report.gradients,
        "hvp_evaluations": report.products,
        "inner_residual": residual,
        "linear_residual": report.linear_residual,
        "verdict": _verdict(error, report, residual),
    }


def _verdict(error: float | None, report: _Report, residual: float) -> str:
    if error is None or not math.isfinite(error) or error > 10:
        return "diverged"
    # The square root of the rounding unit: half of the digits agree.
    if error <= torch.finfo(report.dtype).eps ** 0.5:
        return "exact"
    if report.implicit and not residual <= STATIONARY:
        return "not stationary"
    return "biased"


def inner_residual(problem: Problem, outer: Params, episode: Episode, solver: Solver) -> float:
    """Return the norm of the inner gradient after the inner loop over that before; NaN if lost."""
    try:
        solution = adapt(problem, outer, episode.support, solver=solver)
    except NonFiniteError:
        return math.nan
    outer = tree.detach(outer)
    support = tree.detach(problem.prepared(outer, episode).support)
    start = tree.detach(problem.start(outer))
    before, after = gradient_norms(problem, outer, support, start, solution.params)
    return float(after / before)


def environment(dtype: torch.dtype) -> dict[str, Any]:
    """Return versions, machine, threads and floating-point type, for reports."""
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
    }


def _timed(run: Callable[[], Any]) -> float:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _dtype(outer: Params) -> torch.dtype:
    return next(iter(outer.values())).dtype


def _flat(grads: Params) -> Tensor:
    return torch.cat([g.detach().reshape(-1).double() for _, g in sorted(grads.items())])


def _short(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
