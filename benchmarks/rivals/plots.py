"""Plots of the race: time against memory for a case, and growth along an axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

OURS, OTHERS = "#c1440e", "#4c6a92"


def write(report: dict[str, Any], folder: Path) -> list[tuple[str, Path]]:
    """Write the plots of a workload on its smallest number of threads; return title and path."""
    least = min(run["threads"] for run in report["runs"])
    runs = [run for run in report["runs"] if run["threads"] == least]
    written = []
    axes = dict.fromkeys(run["case"]["axis"] for run in runs if "axis" in run["case"])
    for axis in axes:
        chosen = [run for run in runs if run["case"].get("axis") == axis]
        figure = growth(chosen, axis)
        written.append((f"CPU time against {axis}", figure, f"{report['workload']}_{axis}"))
    if not axes:
        figure = bars(report, runs)
        written.append(("CPU time relative to the reference", figure, report["workload"]))
    # Without a date, and with names that do not change: the same data give the same file.
    found = []
    with rc_context({"svg.hashsalt": "metafocus"}):
        for title, figure, name in written:
            path = folder / f"rivals_{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            found.append((title, path))
    return found


def growth(runs: list[dict[str, Any]], axis: str) -> Figure:
    """Return CPU seconds against an axis, both logarithmic, a line for each contender."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    labels = dict.fromkeys(k for run in runs for k, r in run["rows"].items() if "seconds" in r)
    for label in labels:
        points = [
            (run["case"][axis], run["rows"][label]["seconds"] * 1e3)
            for run in runs
            if "seconds" in run["rows"].get(label, {})
        ]
        ours = label.startswith("metafocus")
        ax.plot(*zip(*points, strict=True), marker="o", label=label, lw=2.5 if ours else 1.2)
    ax.set(xscale="log", yscale="log", xlabel=axis, ylabel="CPU ms")
    ax.set_xscale("log", base=2)
    ax.grid(True, alpha=0.3)
    ax.legend(fontsize=8, frameon=False)
    return figure


def bars(report: dict[str, Any], runs: list[dict[str, Any]]) -> Figure:
    """Return ratios to the reference with quartiles, a panel for each case."""
    height = max(sum("seconds" in r for r in run["rows"].values()) for run in runs)
    size = (4.6 * len(runs), 0.26 * height + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    for ax, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        rows = [(k, r) for k, r in run["rows"].items() if "seconds" in r]
        rows.sort(key=lambda item: -item[1]["ratio"])
        middle = [r["ratio"] for _, r in rows]
        low = [max(r["ratio"] - r["ratio_quartiles"][0], 0) for _, r in rows]
        high = [max(r["ratio_quartiles"][1] - r["ratio"], 0) for _, r in rows]
        colours = [OURS if k.startswith("metafocus") else OTHERS for k, _ in rows]
        at = range(len(rows))
        ax.barh(at, middle, xerr=[low, high], color=colours, height=0.7, ecolor="#333", capsize=2)
        ax.set_yticks(at, [k for k, _ in rows], fontsize=8)
        ax.axvline(1, color="#333", lw=0.8, ls="--")
        ax.set_title(", ".join(f"{k} {v}" for k, v in run["case"].items()), fontsize=9)
        ax.set_xlabel(f"CPU time / {report['reference']}", fontsize=8)
    return figure
