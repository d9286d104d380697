"""What a comparison of estimators found: rows, and the ways to look at them."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metafocus.comparison.inner_curve import shown
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

MARKERS = "os^DvP*X"
"""One for each ten estimators: colours repeat after ten."""


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
            With several seeds also `spread`, the standard deviation over them relative to the
            norm of the reference.
        reference: the name of the reference.
        environment: versions and machine.
        inner_losses: the inner loss before each inner step, and after the last one. The table warns
            where the last step raised it.
    """

    rows: list[dict[str, Any]]
    reference: str
    environment: dict[str, Any] = field(default_factory=dict)
    inner_losses: list[float] = field(default_factory=list)

    def table(self) -> str:
        """Return the rows as a table for a terminal."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"hypergradients against {self.reference}")
        heads = ("estimator", "error", "cosine", "norm", "seconds", "peak MB", "grads", "HVPs")
        spread = any("spread" in row for row in self.rows)
        last = ("inner res.", "linear res.", *(["spread"] if spread else []), "verdict")
        for head in (*heads, *last):
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
                *([_short(row.get("spread"), ".1e")] if spread else []),
                row["verdict"],
            )
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(table)
        text = console.export_text().rstrip()
        return f"{text}\ninner {shown(self.inner_losses)}" if self.inner_losses else text

    def plot(self, path: str | Path) -> None:
        """Write error against time and against memory, both logarithmic, as a figure.

        An estimator without a finite hypergradient has no point in it.
        """
        from matplotlib import ticker
        from matplotlib.figure import Figure

        # Without pyplot: no window, and the back end of a notebook stays as it is.
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        errors = [row["relative_error"] for row in self.rows if row["relative_error"]]
        # An error of zero is drawn a little below the smallest that is not.
        floor = max(min((e for e in errors if math.isfinite(e)), default=1e-16) / 10, 1e-17)
        for axis, key, unit, label in (
            (axes[0], "seconds", 1.0, "seconds (median)"),
            (axes[1], "peak_bytes", 2.0**20, "peak memory of tensors, MB"),
        ):
            errors = [(row, row["relative_error"]) for row in self.rows]
            shown = [row for row, e in errors if e is not None and math.isfinite(e)]
            for i, row in enumerate(shown):
                x, y = row[key] / unit, max(row["relative_error"], floor)
                colour, marker = f"C{i % 10}", MARKERS[i // 10 % len(MARKERS)]
                axis.scatter([x], [y], s=45, color=colour, marker=marker, label=row["name"])
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.grid(True, which="major", alpha=0.3)
        axes[0].set_ylabel(f"relative error against {self.reference}")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
        figure.savefig(path, dpi=150)

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows as a data frame; pandas must be installed."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def to_json(self, path: str | Path) -> None:
        """Write rows, reference, inner losses and environment as JSON; NaN becomes null."""
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


def _short(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
