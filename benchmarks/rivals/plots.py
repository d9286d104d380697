"""Plots of the comparison: time against memory for a case, and growth along an axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter

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
    return [
        (title, saved(figure, folder / f"rivals_{name}.svg")) for title, figure, name in written
    ]


def saved(figure: Figure, path: Path) -> Path:
    """Write a figure; the same data give the same file."""
    with rc_context({"svg.hashsalt": "metafocus"}):
        figure.savefig(path, metadata={"Date": None})
    return path


def growth(runs: list[dict[str, Any]], axis: str) -> Figure:
    """Return CPU time, and memory if measured, against an axis; all axes are logarithmic."""
    shown = [("seconds", 1e3, "CPU ms")]
    if all(any(row.get("process_bytes") for row in run["rows"].values()) for run in runs):
        shown.append(("peak", 2.0**-20, "peak memory, MB"))
    figure = Figure(figsize=(5.2 * len(shown) + 1.8, 4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    labels = dict.fromkeys(k for run in runs for k, r in run["rows"].items() if "seconds" in r)
    for ax, (key, unit, title) in zip(panels, shown, strict=True):
        for label in labels:
            points = [
                (run["case"][axis], _value(run["rows"][label], key) * unit)
                for run in runs
                if _value(run["rows"].get(label, {}), key)
            ]
            ours = label.startswith("metafocus")
            style = {"lw": 2.2, "marker": "o"} if ours else {"lw": 1.2, "marker": ".", "ls": "--"}
            if points:
                ax.plot(*zip(*points, strict=True), label=label, **style)
        axes(ax, axis, title)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8,
        frameon=False,
    )  # fmt: skip
    return figure


def _value(row: dict[str, Any], key: str) -> float:
    if key != "peak":
        return row.get(key) or 0
    # What keeps its last graph grows by less than it needs.
    return max(row.get("process_bytes") or 0, row.get("tensor_bytes") or 0)


def axes(ax: Any, x: str, y: str) -> None:
    """Make both axes logarithmic, with plain numbers on them."""
    ax.set(yscale="log", xlabel=x, ylabel=y)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # Plain numbers, between powers of ten too where there are few of these.
    ax.yaxis.set_major_formatter(LogFormatter())
    ax.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    ax.grid(True, alpha=0.3)


def bars(report: dict[str, Any], runs: list[dict[str, Any]]) -> Figure:
    """Return ratios to the reference with quartiles, a panel for each case."""
    height = max(sum("seconds" in r for r in run["rows"].values()) for run in runs)
    lines = -(-len(runs) // 2)
    columns = min(len(runs), 2)
    figure = Figure(figsize=(4.8 * columns, (0.24 * height + 1.1) * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax in panels[len(runs) :]:
        ax.set_axis_off()
    for ax, run in zip(panels, runs, strict=False):
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
