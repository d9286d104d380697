"""The figures of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from effects import Results, accuracy, interval, mass
from scale import MAIN, SWEEPS, Cell, Scale

COLOURS = ("#4c6a92", "#c0504d", "#7f9a48", "#8064a2")


def draw(
    scale: Scale, base: dict[str, Any], results: Results, names: dict[Cell, str], folder: Path
) -> dict[str, str]:
    """Write every figure as PNG and SVG; return their names and captions."""
    found = {
        "accuracy": "Accuracy by length, as deployed: mean of the seeds and 95 % interval",
        "sink": "Attention of answers on the first token, by layer: as deployed, and as trained "
        "(training mask, fast weights where there are any)",
        "attention": "Attention of answers as deployed, mean over layers: 95 % interval over seeds",
        "training": "Outer loss in fine-tuning, mean of the seeds",
    }
    _accuracy(scale, results, names, folder)
    _sink(base, results, names, folder)
    _attention(results, names, folder)
    _training(results, names, folder)
    if any(len(results.get(c.name, {})) for s in SWEEPS.values() for c in s if c not in MAIN):
        _sweeps(scale, results, folder)
        found["sweeps"] = "Accuracy as deployed along each sweep, trained tasks: 95 % interval"
    return found


def _save(figure: Any, folder: Path, name: str) -> None:
    figure.savefig(folder / f"{name}.png", dpi=120)
    figure.savefig(folder / f"{name}.svg")
    plt.close(figure)


def _runs(results: Results, cell: Cell) -> list[dict[str, Any]]:
    return list(results.get(cell.name, {}).values())


def _errors(values: list[np.ndarray]) -> tuple[float, float, float]:
    if not values:
        return np.nan, np.nan, np.nan
    found = interval(np.stack([np.atleast_1d(v) for v in values]))
    return found.mean, found.mean - found.low, found.high - found.mean


def _accuracy(scale: Scale, results: Results, names: dict[Cell, str], folder: Path) -> None:
    tasks = scale.trained + scale.held_out
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4 * len(tasks), 3.6), sharey=True, layout="constrained"
    )
    for axis, task in zip(axes, tasks, strict=True):
        for shift, (cell, colour) in enumerate(zip(MAIN, COLOURS, strict=True)):
            points = [
                _errors([accuracy("deployed", (task,), (n,))(run) for run in _runs(results, cell)])
                for n in scale.lengths
            ]
            mean, low, high = np.array(points).T
            x = np.array(scale.lengths) * 1.03 ** (shift - 1.5)
            axis.errorbar(x, mean, (low, high), marker="o", ms=4, c=colour, label=names[cell])
        axis.axvline(scale.length, color="0.8", lw=1, zorder=0)
        axis.set(xscale="log", xlabel="tokens", ylim=(-0.03, 1.03))
        axis.set_xticks(scale.lengths, [str(n) for n in scale.lengths])
        axis.minorticks_off()
        axis.set_title(task + (" (held out)" if task in scale.held_out else ""), fontsize=10)
    axes[0].set_ylabel("accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    _save(figure, folder, "accuracy")


def _sink(base: dict[str, Any], results: Results, names: dict[Cell, str], folder: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.6), sharey=True, layout="constrained")
    for axis, title in zip(axes, ("as deployed", "as trained"), strict=True):
        axis.plot(
            base["attention"]["deployed"]["sink_by_layer"], c="0.6", ls="--", label="the base"
        )
        for cell, colour in zip(MAIN, COLOURS, strict=True):
            trained = "with fast weights" if cell.inner else "training mask"
            way = "deployed" if title == "as deployed" else trained
            rows = [run["attention"][way]["sink_by_layer"] for run in _runs(results, cell)]
            if rows:
                axis.plot(np.mean(rows, 0), marker="o", ms=4, c=colour, label=names[cell])
        axis.set(xlabel="layer", title=title)
    axes[0].set_ylabel("sink mass")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    _save(figure, folder, "sink")


def _attention(results: Results, names: dict[Cell, str], folder: Path) -> None:
    measures = {
        "sink_mass": "first token",
        "context_engagement": "context",
        "needle_mass": "evidence",
        "max_column_mass": "largest column",
    }
    figure, axis = plt.subplots(figsize=(8.5, 3.6), layout="constrained")
    for i, (cell, colour) in enumerate(zip(MAIN, COLOURS, strict=True)):
        points = [
            _errors([mass("deployed", name)(run) for run in _runs(results, cell)])
            for name in measures
        ]
        mean, low, high = np.array(points).T
        x = np.arange(len(measures)) + 0.2 * (i - 1.5)
        axis.bar(x, mean, 0.18, yerr=(low, high), color=colour, label=names[cell], capsize=2)
    axis.set_xticks(range(len(measures)), list(measures.values()))
    axis.set_ylabel("share of attention")
    axis.legend(fontsize=8)
    _save(figure, folder, "attention")


def _training(results: Results, names: dict[Cell, str], folder: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for cell, colour in zip(MAIN, COLOURS, strict=True):
        rows = [run["training"]["loss"] for run in _runs(results, cell)]
        if rows:
            mean = np.mean(rows, 0)
            width = max(len(mean) // 20, 1)
            smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
            axis.plot(np.arange(len(smooth)) + width, smooth, c=colour, label=names[cell])
    axis.set(xlabel="outer step", ylabel="outer loss")
    axis.legend(fontsize=8)
    _save(figure, folder, "training")


def _sweeps(scale: Scale, results: Results, folder: Path) -> None:
    lengths = {"trained length": (scale.length,)}
    longer = tuple(n for n in scale.lengths if n > scale.length)
    if longer:
        lengths["longer"] = longer
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4), sharey=True, layout="constrained")
    chosen = (("inner steps K", "steps"), ("layer fraction", "fraction"))
    for axis, (title, name) in zip(axes, chosen, strict=True):
        cells = SWEEPS[title]
        x = [getattr(cell, name) if cell.inner else 0 for cell in cells]
        for (label, some), colour in zip(lengths.items(), COLOURS, strict=False):
            points = [
                _errors(
                    [accuracy("deployed", scale.trained, some)(run) for run in _runs(results, cell)]
                )
                for cell in cells
            ]
            mean, low, high = np.array(points).T
            axis.errorbar(x, mean, (low, high), marker="o", ms=4, c=colour, label=label)
        axis.set(xlabel=title)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(fontsize=8)
    _save(figure, folder, "sweeps")
