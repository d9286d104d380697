"""A table of scores with intervals, and a heat map by depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metafocus.evals.results import Cell

if TYPE_CHECKING:
    from rich.table import Table


def length_name(length: int) -> str:
    """Return a short name of a length, such as 4k for 4096.

    Example:
        >>> from metafocus.evals.report import length_name
        >>> length_name(4096), length_name(0), length_name(500)
        ('4k', '0k', '500')
    """
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def table(cells: Sequence[Cell]) -> Table:
    """Return a table with one row for each task, length and scorer, in per cent."""
    from rich.table import Table

    found = Table(title="Scores in per cent, with 95 % Wilson intervals")
    for name in ("task", "length", "scorer", "score", "interval", "n"):
        text = name in ("task", "scorer")
        found.add_column(name, justify="left" if text else "right", no_wrap=True)
    for cell in cells:
        for score in cell.scores:
            found.add_row(
                cell.task,
                length_name(cell.length),
                score.scorer,
                f"{100 * score.mean:.1f}",
                f"{100 * score.low:.1f} to {100 * score.high:.1f}",
                str(score.n),
            )
    return found


def plot_depths(cells: Sequence[Cell], path: str | Path) -> bool:
    """Draw the score by length and depth, with one panel for each task.

    White areas have no evidence of any question. Return False if no task has depths.
    """
    from matplotlib.figure import Figure

    shown = [cell for cell in cells if any(part is not None for part in cell.by_depth)]
    tasks = list(dict.fromkeys(cell.task for cell in shown))
    if not tasks:
        return False
    columns = min(len(tasks), 4)
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    image = None
    for axis, task in zip(axes, tasks, strict=False):
        own = sorted((cell for cell in shown if cell.task == task), key=lambda cell: cell.length)
        grid = [
            [math.nan if part is None else 100 * part[0] for part in bins]
            for bins in zip(*(cell.by_depth for cell in own), strict=True)
        ]
        image = axis.imshow(
            grid, vmin=0, vmax=100, cmap="viridis", aspect="auto", extent=(0, len(own), 100, 0)
        )
        axis.set_xticks([i + 0.5 for i in range(len(own))], [length_name(c.length) for c in own])
        axis.set(title=task, xlabel="tokens")
    for axis in axes[len(tasks) :]:
        axis.set_axis_off()
    assert image is not None
    for axis in axes[: len(tasks) : columns]:
        axis.set_ylabel("depth of the evidence, %")
    figure.colorbar(image, ax=axes, label="score, %")
    figure.savefig(path, dpi=150)
    return True
