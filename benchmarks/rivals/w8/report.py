"""W8 on the page: how many oracle calls and seconds each needs, and a plot of the way there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.rivals import plots

TEXT = """
The *simulated* problem of benchopt/benchmark_bilevel, by its own code: quadratic losses, {sizes};
its own solvers in JAX {jax} ({version}), compiled before the clock starts, against this library's
single loops and an outer loop on implicit hypergradients, eager. All in float64 on one thread, from
its start. *Oracle calls* are gradients of a loss and products with its second derivatives, in full
batches; the function values of line searches are not counted. A run ends at a sub-optimality of
{goal:.0e}, in closed form, or after {limit:.0f} s of CPU time; evaluation is not timed. Load
average {load}.
"""


def section(report: dict[str, Any], figures: Path, link: str) -> list[str]:
    """Return the lines, and write the plot."""
    path = plots.saved(plot(report), figures / "w8.svg")
    load = " to ".join(f"{x:.1f}" for x in report["load"])
    sizes = ", ".join(f"{k} {v}" for k, v in report["sizes"].items())
    text = TEXT.format(
        **{**report, "sizes": sizes, "load": load, "jax": report["environment"]["jax"]}
    )
    lines = ["", "### W8: oracle calls to a sub-optimality", "", " ".join(text.split()), ""]
    lines += [f"![Sub-optimality against oracle calls and CPU seconds]({link}/{path.name})", ""]
    return lines + table(report)


def table(report: dict[str, Any]) -> list[str]:
    """Return the runs: those that arrived by oracle calls, then the others."""
    lines = [
        "| | setting | oracle calls | CPU s | wall s | sub-optimality |",
        "|---|---|---|---|---|---|",
    ]
    ran = [row for row in report["rows"] if "error" not in row]
    for row in sorted(ran, key=lambda row: (not row["reached"], row["points"][-1][0])):
        calls, cpu, wall, _ = row["points"][-1]
        name = f"**{row['name']}**" if row["name"].startswith("metafocus") else row["name"]
        start = "" if row["reached"] else "not reached in "
        lines.append(
            f"| {name} | {row['setting']} | {start}{calls:.0f} | {cpu:.2f} | {wall:.2f} | "
            f"{row['least']:.1e} |"
        )
    for row in report["rows"]:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['setting']} | {row['error']} | | | |")
    return lines


def best(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the run of each name that arrived with the fewest calls, or came closest."""
    found: dict[str, dict[str, Any]] = {}
    for row in report["rows"]:
        if "error" not in row:
            other = found.get(row["name"])
            if other is None or _rank(row) < _rank(other):
                found[row["name"]] = row
    return list(found.values())


def _rank(row: dict[str, Any]) -> tuple[bool, float]:
    return not row["reached"], row["points"][-1][0] if row["reached"] else row["least"]


def plot(report: dict[str, Any]) -> Figure:
    """Return sub-optimality against oracle calls and against CPU seconds, the best of each name."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for i, row in enumerate(best(report)):
        ours = row["name"].startswith("metafocus")
        style = {"lw": 2.2} if ours else {"lw": 1.4, "ls": "--"}
        for panel, index in zip(panels, (0, 1), strict=True):
            # The start has no place on a logarithmic axis.
            points = row["points"][1:]
            x, error = [point[index] for point in points], [point[3] for point in points]
            panel.plot(x, error, color=f"C{i}", label=row["name"], **style)
    for panel, word in zip(panels, ("oracle calls, full batches", "CPU s"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel=word)
        panel.axhline(report["goal"], color="#333", lw=0.8, ls=":")
        panel.grid(True, alpha=0.3)
    panels[0].set_ylabel("sub-optimality")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8,
        frameon=False,
    )  # fmt: skip
    return figure
