"""The page docs/growth.md and its figures: `python benchmarks/growth.py --report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.growth import AXES, RESULTS
from benchmarks.rivals.plots import saved

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "growth.md"
FIGURES = ROOT / "docs" / "figures" / "growth"
OVERHEAD = RESULTS.with_name("overhead.json")
TEXTS = Path(__file__).with_name("growth_texts.json")


def page(report: dict[str, Any], texts: dict[str, Any]) -> str:
    """Return the page."""
    lines = ["# How cost grows", "", texts["introduction"], ""]
    for axis in measured(report):
        rows = [row for row in report["rows"] if row["axis"] == axis]
        text = texts[axis]
        lines += [f"## {text['title']}", "", text["finding"], ""]
        lines += [f"![CPU time and peak memory against {axis}](figures/growth/{axis}.svg)", ""]
        lines += [f"{text['case']}", "", *table(rows, axis), ""]
    lines += ["## What a step costs beyond the same loop by hand", "", texts["overhead"], ""]
    lines += [*overhead(json.loads(OVERHEAD.read_text())["rows"]), ""]
    at = report["environment"]
    lines += [
        f"Measured with torch {at['torch']}, one thread, float32, each point in a process of its "
        "own: seconds of CPU time, and the growth of the peak RSS. `python benchmarks/growth.py` "
        "measures what is missing, and `--report` writes this page."
    ]
    return "\n".join(lines) + "\n"


def measured(report: dict[str, Any]) -> list[str]:
    """Return the axes with more than one size: one point is no growth."""
    sizes = {axis: {r["count"] for r in report["rows"] if r["axis"] == axis} for axis in AXES}
    return [axis for axis, found in sizes.items() if len(found) > 1]


def table(rows: list[dict[str, Any]], axis: str) -> list[str]:
    """Return a table: a line for each contender, a column for each size."""
    counts = sorted({row["count"] for row in rows})
    found = {(row["line"], row["count"]): row for row in rows}
    lines = [f"| {axis} | " + " | ".join(f"{c:,}" for c in counts) + " |"]
    lines.append("|---|" + "---:|" * len(counts))
    for line in AXES[axis][1]:
        cells = [cell(found.get((line, c))) for c in counts]
        lines.append(f"| `{line}` | " + " | ".join(cells) + " |")
    return lines


def cell(row: dict[str, Any] | None) -> str:
    """Return what stands in a cell."""
    if row is None:
        return ""
    if "error" in row:
        return row["error"]
    peak = row["peak_bytes"] / 2**20
    return f"{row['seconds']:.3g} s, {f'{peak:.3g}' if peak >= 0.1 else '<0.1'} MB"


def overhead(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of steps beside the same loop by hand."""
    lines = ["| parameters | K | order | by hand, ms | `backward` | `hypergrad` |"]
    lines.append("|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        ratios = [
            f"{one['ratio']:.2f} ({one['quartiles'][0]:.2f}-{one['quartiles'][1]:.2f})"
            for one in (row["backward"], row["hypergrad"])
        ]
        lines.append(
            f"| {row['parameters']:,} | {row['steps']} | {row['order']} | "
            f"{1e3 * row['by hand']['seconds']:.3g} | " + " | ".join(ratios) + " |"
        )
    return lines


def figure(rows: list[dict[str, Any]], axis: str) -> Figure:
    """Return CPU time and memory against an axis."""
    drawn = Figure(figsize=(10, 3.6), layout="constrained")
    panels = drawn.subplots(1, 2)
    for ax, (key, unit, title) in zip(
        panels,
        (("seconds", 1.0, "CPU seconds"), ("peak_bytes", 2.0**-20, "peak memory, MB")),
        strict=True,
    ):
        for line in AXES[axis][1]:
            points = [
                (row["count"], row[key] * unit)
                for row in rows
                if row["line"] == line and row.get(key, 0) > 0
            ]
            if points:
                ax.plot(*zip(*sorted(points), strict=True), marker="o", ms=4, label=line)
        ax.set(xscale="log", yscale="log", xlabel=axis, ylabel=title)
        ax.grid(alpha=0.3)
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return drawn


def write(report: dict[str, Any]) -> None:
    """Write the page and its figures."""
    FIGURES.mkdir(exist_ok=True)
    for axis in measured(report):
        rows = [row for row in report["rows"] if row["axis"] == axis]
        saved(figure(rows, axis), FIGURES / f"{axis}.svg")
    PAGE.write_text(page(report, json.loads(TEXTS.read_text())))


def committed() -> str:
    """Return the page as it should be."""
    return page(json.loads(RESULTS.read_text()), json.loads(TEXTS.read_text()))
