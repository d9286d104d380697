"""What a comparison of estimators found: rows, and the ways to look at them."""

from __future__ import annotations

import dataclasses
import io
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metafocus.comparison.averages import of_seeds
from metafocus.comparison.inner_curve import shown
from metafocus.comparison.latex import latex
from metafocus.comparison.verdicts import advice
from metafocus.files import write_json

if TYPE_CHECKING:
    import pandas as pd

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

WIDTH = 200
"""Of a table with intervals or axes."""


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
            `|H x - b| / |b|`; for `FixedPoint` both are of its step. `verdict` is the first that
            holds of: diverged (not finite, or error above 10), zero, exact (half of the digits),
            noisy (over seeds), not stationary (inner residual above 1e-2), not converged (linear
            residual above 1e-2), close (error up to 5 %), right direction, wrong length (cosine
            from 0.95), biased.
            With several seeds, error, cosine, norm and seconds are means over them, with the ends
            of 95 % intervals in `..._low` and `..._high`; `spread` is the standard deviation of the
            hypergradient relative to the norm of the reference, `diverged` counts the seeds
            without a finite one, over which no mean is taken; one seed that is left has no
            interval. `reference_error` is how well central differences are known, if they are
            the reference. Over axes `last_step_rose` says whether the last inner step
            raised the inner loss.
        reference: the name of the reference.
        environment: versions and machine.
        inner_losses: the inner loss before each inner step, and after the last one; empty over
            axes. The table warns where the last step raised it.
        over: the values of each axis, by its name; rows have a column for each.
        setting: the solver, the axes and the seeds in words.
    """

    rows: list[dict[str, Any]]
    reference: str
    environment: dict[str, Any] = field(default_factory=dict)
    inner_losses: list[float] = field(default_factory=list)
    over: dict[str, list[Any]] = field(default_factory=dict)
    setting: str = ""

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Return the rows as a table for a terminal, with what to do about each verdict."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"hypergradients against {self.reference}", caption=self.setting)
        several = any("spread" in row for row in self.rows)
        for head in self.over:
            table.add_column(head.removeprefix("solver."))
        heads = ("estimator", "error", "cosine", "norm", "seconds", "peak MB", "grads", "HVPs")
        last = ("inner res.", "linear res.", *(["spread"] if several else []), "verdict")
        for head in (*heads, *last):
            table.add_column(head, justify="left" if head in ("estimator", "verdict") else "right")
        before = None
        for row in self.rows:
            here = tuple(str(row[axis]) for axis in self.over)
            if before not in (None, here):
                table.add_section()
            before = here
            peak = row["peak_bytes"]
            table.add_row(
                *here,
                row["name"],
                _mean(row, "relative_error", ".1e") + of_seeds(row),
                _mean(row, "cosine", ".3f" if several else ".4f"),
                _mean(row, "norm_ratio", ".3f"),
                _short(row["seconds"], ".4f"),
                _short(None if peak is None else peak / 2**20, ".2f"),
                _short(row["gradient_evaluations"], "d"),
                _short(row["hvp_evaluations"], "d"),
                _short(row["inner_residual"], ".1e"),
                _short(row["linear_residual"], ".1e"),
                *([_short(row.get("spread"), ".1e")] if several else []),
                row["verdict"],
            )
        width = WIDTH if several or self.over else 160
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(table)
        return "\n".join([console.export_text().rstrip(), *self._notes()])

    def _notes(self) -> list[str]:
        found = [f"inner {shown(self.inner_losses)}"] if self.inner_losses else []
        rose = {
            ", ".join(f"{axis} = {row[axis]}" for axis in self.over): None
            for row in self.rows
            if row.get("last_step_rose")
        }
        if rose:
            where = "; ".join(rose)
            found.append(f"warning: the last inner step raised the inner loss at {where}")
        known = [row["reference_error"] for row in self.rows if "reference_error" in row]
        if known:
            found.append(f"{self.reference} are known to a relative error of {max(known):.1e}")
        verdicts = dict.fromkeys(row["verdict"] for row in self.rows)
        return [*found, *(advice(name) for name in verdicts if name != "exact")]

    def plot(self, path: str | Path) -> None:
        """Write the figure that answers the question: PNG, SVG or PDF, by the name of the file.

        Without `over`: error against time and memory. With it: error, cosine and norm against the
        first axis, one line for each contender and value of the other axes, with 95 % bands.
        """
        from metafocus.comparison import figures

        (figures.curves if self.over else figures.pareto)(self, path)

    def pareto(self, path: str | Path) -> None:
        """Write error against time and against memory, both logarithmic, as a figure.

        A line joins what is best: nothing else is both more exact and cheaper. A contender without
        a finite hypergradient has no point in it.
        """
        from metafocus.comparison import figures

        figures.pareto(self, path)

    def to_latex(self) -> str:
        r"""Return the rows as a LaTeX table in the style of `booktabs`, with 95 % intervals.

        Example:
            >>> rows = [{"name": "first_order", "relative_error": 0.25, "cosine": 0.9,
            ...     "norm_ratio": 1.2, "seconds": 0.5, "peak_bytes": 2**20, "verdict": "biased"}]
            >>> print(Comparison(rows, "full").to_latex().splitlines()[4])
            first\_order & 0.25 & 0.900 & 1.20 & 0.5 & 1 & biased \\
        """
        return latex(self.rows, list(self.over))

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows as a data frame; pandas must be installed."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def to_json(self, path: str | Path) -> None:
        """Write all of it as JSON; NaN becomes null."""
        write_json(path, dataclasses.asdict(self))


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


def _mean(row: dict[str, Any], key: str, form: str) -> str:
    """Return a mean, with half of its interval where there is one."""
    value, low, high = (row.get(k) for k in (key, f"{key}_low", f"{key}_high"))
    text = _short(value, form)
    if value is None or low is None or high is None or high - low <= 1e-9 * abs(value):
        return text
    # The larger half: an interval may be cut at what is possible.
    return f"{text} ±{max(high - value, value - low):.1g}"


def _short(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
