"""Figures of a comparison: error against cost, and error, cosine and norm over an axis."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metafocus.checks import is_number
from metafocus.comparison.labels import label_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from metafocus.comparison.report import Comparison

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A")
"""Okabe and Ito's, which the colour-blind can tell apart; yellow is too pale for lines."""
MARKERS = "os^DvP*X<>"
LINES = ("-", "--", "-.", ":")
FLOOR = 1e-17


def look(i: int) -> tuple[str, str]:
    """Return colour and marker of the contender with this number.

    Example:
        >>> len({look(i) for i in range(40)})
        40
    """
    # Both change from one to the next, and no pair comes twice among the first 40.
    return COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]


def curves(found: Comparison, path: str | Path) -> None:
    """Write error, cosine and norm against the first axis, as a figure.

    A hollow marker is where the last inner step raised the inner loss.
    """
    from matplotlib.figure import Figure

    axis, *others = found.over
    names = list(dict.fromkeys(row["name"] for row in found.rows))
    rest = list(dict.fromkeys(tuple(row[o] for o in others) for row in found.rows))
    values = found.over[axis]
    numeric = all(is_number(v) for v in values)
    place = (lambda v: v) if numeric else values.index
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    floor = _floor(found.rows)
    for panel, key in zip(panels, ("relative_error", "cosine", "norm_ratio"), strict=True):
        for i, name in enumerate(names):
            for j, fixed in enumerate(rest):
                rows = [
                    row
                    for row in found.rows
                    if row["name"] == name and tuple(row[o] for o in others) == fixed
                ]
                label = ", ".join(
                    [name, *(f"{o} = {v}" for o, v in zip(others, fixed, strict=True))]
                )
                least = floor if key == "relative_error" else None
                _curve(panel, rows, (axis, key), place, (i, j), label, least)
        panel.set_xlabel(axis)
        panel.grid(True, alpha=0.3)
        if numeric and _spans(values):
            panel.set_xscale("log")
        if numeric and len(values) <= 8:
            panel.set_xticks(values, [f"{v:g}" for v in values])
            panel.minorticks_off()
        if not numeric:
            panel.set_xticks(range(len(values)), [textwrap.fill(str(v), 16) for v in values])
    error, cosine, norm = panels
    error.set(ylabel="relative error", yscale="log", title="error")
    cosine.set(ylabel="cosine", title="direction")
    cosine.axhline(1, color="black", linewidth=0.8)
    norm.set(ylabel="norm, relative", title="length")
    norm.axhline(1, color="black", linewidth=0.8)
    if any(row["norm_ratio"] and not 0.1 < row["norm_ratio"] < 10 for row in found.rows):
        norm.set_yscale("log")
    notes = ["bands: 95 % intervals of the mean"] if _several(found.rows) else []
    if any(row.get("diverged") for row in found.rows):
        notes.append("some seeds have no finite hypergradient and are in no mean")
    notes += _exact_note(found.rows, floor)
    if any(row.get("last_step_rose") for row in found.rows):
        notes.append("hollow: the last inner step raised the inner loss")
    _finish(figure, found, notes, path, cosine.get_legend_handles_labels())


def pareto(found: Comparison, path: str | Path) -> None:
    """Write error against time and against memory, both logarithmic, as a figure."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    # Without pyplot: no window, and the back end of a notebook stays as it is.
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    labels: list[tuple[Axes, list[tuple[float, float, str]]]] = []
    floor = _floor(found.rows)
    names = list(dict.fromkeys(row["name"] for row in found.rows))
    shown = [row for row in found.rows if _drawable(row["relative_error"])]
    for panel, key, unit, label in (
        (panels[0], "seconds", 1.0, "time of one hypergradient, seconds"),
        (panels[1], "peak_bytes", 2.0**20, "peak memory of tensors, MB"),
    ):
        points = []
        for i, name in enumerate(names):
            colour, marker = look(i)
            mine = [
                (row[key] / unit, max(row["relative_error"], floor), row)
                for row in shown
                if row["name"] == name and row[key]
            ]
            if found.over:
                panel.plot([x for x, *_ in mine], [y for _, y, _ in mine], color=colour, alpha=0.4)
            for k, (x, y, row) in enumerate(mine):
                named = name if k == 0 else None
                panel.scatter([x], [y], s=48, color=colour, marker=marker, label=named, zorder=3)
                points.append((x, y, _point_label(row, found.over) or name))
        labels.append((panel, points))
        _front(panel, points)
        panel.set(xscale="log", yscale="log", xlabel=label)
        low, high = (f([x for x, *_ in points], default=1.0) for f in (min, max))
        subs = (1.0, 2.0, 5.0) if high < 30 * low else (1.0, 3.0) if high < 300 * low else (1.0,)
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
        panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.margins(x=0.18, y=0.15)
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("relative error")
    notes = [
        "grey line: nothing is both more exact and cheaper",
        *_exact_note(shown, floor),
    ]
    handles = None
    if found.over:
        notes.append(f"numbers: {', '.join(found.over)}")
        handles = panels[0].get_legend_handles_labels()
    _finish(figure, found, notes, path, handles, labels)


def _finish(
    figure: Any,
    found: Comparison,
    notes: Sequence[str],
    path: str | Path,
    handles: Any,
    labels: Sequence[tuple[Axes, Sequence[tuple[float, float, str]]]] = (),
) -> None:
    """Add the setting as a title, the notes and the legend; write the file."""
    lines = textwrap.wrap(f"against {found.reference}; {found.setting}", 150)
    figure.suptitle("\n".join([*lines, *(["; ".join(notes)] if notes else [])]), fontsize=9)
    if handles is not None:
        figure.legend(*handles, loc="outside right center", fontsize=8, frameon=False)
    if labels:
        # The places of points in the figure are known after its layout.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for panel, points in labels:
            label_points(panel, points)
    figure.savefig(path, dpi=150)


def _point_label(row: Mapping[str, Any], axes: Mapping[str, Any]) -> str:
    values = [row[axis] for axis in axes]
    return ", ".join(f"{v:g}" if is_number(v) else textwrap.shorten(str(v), 24) for v in values)


def _curve(
    panel: Axes,
    rows: Sequence[Mapping[str, Any]],
    keys: tuple[str, str],
    place: Callable[[Any], float],
    numbers: tuple[int, int],
    label: str,
    least: float | None,
) -> None:
    """Draw a line with its band; zero errors at the bottom of a logarithmic axis."""
    axis, key = keys
    colour, marker = look(numbers[0])

    def lifted(value: float) -> float:
        return value if least is None else max(value, least)

    rows = sorted((r for r in rows if _drawable(r[key])), key=lambda r: place(r[axis]))
    x = [place(row[axis]) for row in rows]
    style = LINES[numbers[1] % len(LINES)]
    panel.plot(x, [lifted(r[key]) for r in rows], style, color=colour, label=label, marker=marker)
    if rows and f"{key}_low" in rows[0]:
        # One finite seed has no interval: the band has a gap there.
        ends = ([r[f"{key}_{end}"] for r in rows] for end in ("low", "high"))
        low, high = ([math.nan if x is None else lifted(x) for x in side] for side in ends)
        panel.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    hollow = [r for r in rows if r.get("last_step_rose")]
    panel.plot(
        [place(r[axis]) for r in hollow],
        [lifted(r[key]) for r in hollow],
        marker,
        color=colour,
        markerfacecolor="white",
        zorder=3,
    )


def _front(panel: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Draw a line through the points that no other one beats in both directions."""
    best, front = math.inf, []
    for x, y, _ in sorted(points, key=lambda p: p[:2]):
        if y < best:
            best = y
            front.append((x, y))
    if len(front) > 1:
        panel.plot(*zip(*front, strict=True), color="grey", linewidth=1, zorder=1)


def _floor(rows: Sequence[Mapping[str, Any]]) -> float:
    """Where exact ones are drawn: below the smallest error that counts, so that this is seen."""
    errors = [r["relative_error"] for r in rows if _drawable(r["relative_error"])]
    inexact = [
        row["relative_error"]
        for row in rows
        if row["verdict"] != "exact" and _drawable(row["relative_error"])
    ]
    return max(min((e for e in inexact or errors if e > 0), default=1e-16) / 10, FLOOR)


def _exact_note(rows: Sequence[Mapping[str, Any]], floor: float) -> list[str]:
    below = any(r["relative_error"] is not None and r["relative_error"] < floor for r in rows)
    return [f"errors below {floor:.0e} are drawn there"] if below else []


def _drawable(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _several(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(row.get("seeds", 1) > 1 for row in rows)


def _spans(values: Sequence[float]) -> bool:
    """Whether values are best seen on a logarithmic axis."""
    return min(values) > 0 and max(values) >= 8 * min(values)
