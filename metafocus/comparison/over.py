"""Direction and length of hypergradients over a setting, such as the inner learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from metafocus.comparison.inner_curve import diverges
from metafocus.comparison.report import MARKERS, Comparison


def plot_over(found: Mapping[float, Comparison], path: str | Path, label: str) -> None:
    """Write cosine and length of each estimator against the reference, over a setting.

    A hollow marker is where the last inner step raised the inner loss. An estimator without a
    finite hypergradient has no point there.

    Args:
        found: comparisons by the value of the setting.
        path: the file.
        label: what the setting is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["name"] for result in found.values() for row in result.rows))
    reference = next(iter(found.values())).reference
    for axis, key in zip(axes, ("cosine", "norm_ratio"), strict=True):
        for i, name in enumerate(names):
            points = [
                (value, row[key], diverges(result.inner_losses))
                for value, result in sorted(found.items())
                for row in result.rows
                if row["name"] == name and row[key] is not None
            ]
            colour, marker = f"C{i % 10}", MARKERS[i // 10 % len(MARKERS)]
            axis.plot([p[0] for p in points], [p[1] for p in points], color=colour, label=name)
            for value, y, hollow in points:
                face = "white" if hollow else colour
                axis.plot([value], [y], marker, color=colour, markerfacecolor=face, zorder=3)
        axis.set(xscale="log", xlabel=label)
        axis.grid(True, alpha=0.3)
    axes[0].set(ylabel=f"cosine with {reference}", ylim=(-1.05, 1.05))
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[1].set(ylabel=f"norm over that of {reference}", yscale="log")
    figure.suptitle("hollow: the last inner step raised the inner loss", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
