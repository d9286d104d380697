"""The figures of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from effects import Effect, Results, Run, accuracy, as_trained, level, loss, trained
from protocol import MAIN, Cell, Scale

COLOURS = ("#4c6a92", "#c0504d", "#7f9a48", "#8064a2")


def draw(
    scale: Scale, base: Run, results: Results, names: dict[Cell, str], folder: Path
) -> dict[str, str]:
    """Write every figure as PNG and SVG; return their names and captions."""
    _sink(base, results, names, folder)
    _by_length(scale, base, results, names, folder)
    _training(results, names, folder)
    return {
        "sink": "Attention of answers on the first token, by layer: as deployed (causal mask, no "
        "fast weights), and as trained (each cell's mask and fast weights); grey, the untrained "
        "model under the causal mask (dashed) and the bidirectional one (dotted)",
        "length": "As deployed, by length: accuracy and answer loss on trained and held-out tasks, "
        "mean and 95 % interval; grey, the untrained model",
        "training": "Outer loss in fine-tuning, mean of the seeds over four steps",
    }


def _save(figure: plt.Figure, folder: Path, name: str) -> None:
    figure.savefig(folder / f"{name}.png", dpi=120)
    # The same results give the same file.
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def _runs(results: Results, cell: Cell) -> list[Run]:
    return list(trained(results, cell).values())


def _sink(base: Run, results: Results, names: dict[Cell, str], folder: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.8), sharey=True, layout="constrained")
    for axis, title in zip(axes, ("as deployed", "as trained"), strict=True):
        for way, style in (("deployed", "--"), ("training mask", ":")):
            values = base["attention"][way]["sink_by_layer"]
            axis.semilogy(values, c="0.6", ls=style, label="untrained" if style == "--" else None)
        for cell, colour in zip(MAIN, COLOURS, strict=True):
            way = "deployed" if title == "as deployed" else as_trained(cell)
            rows = [run["attention"][way]["sink_by_layer"] for run in _runs(results, cell)]
            if rows:
                axis.semilogy(np.mean(rows, 0), marker="o", ms=3, c=colour, label=names[cell])
        axis.set(xlabel="layer", title=title)
    axes[0].set_ylabel("sink mass")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    _save(figure, folder, "sink")


def _errors(points: Sequence[Effect | None]) -> np.ndarray:
    rows = [(p.mean, p.mean - p.low, p.high - p.mean) if p else (np.nan,) * 3 for p in points]
    return np.array(rows).T


def _by_length(
    scale: Scale, base: Run, results: Results, names: dict[Cell, str], folder: Path
) -> None:
    figure, axes = plt.subplots(
        2, 2, figsize=(8.5, 6), sharex=True, sharey="row", layout="constrained"
    )
    lengths = tuple(scale.chats)
    for row, (label, measure) in zip(
        axes, (("accuracy", accuracy), ("answer loss", loss)), strict=True
    ):
        for axis, (which, tasks) in zip(
            row, (("trained tasks", scale.trained), ("held-out tasks", scale.held_out)), strict=True
        ):
            read = [measure("deployed", tasks, (n,)) for n in lengths]
            axis.plot(lengths, [r(base).mean() for r in read], c="0.6", ls="--", label="untrained")
            for shift, (cell, colour) in enumerate(zip(MAIN, COLOURS, strict=True)):
                mean, low, high = _errors([level(_runs(results, cell), r) for r in read])
                x = np.array(lengths) * 1.03 ** (shift - 1.5)
                axis.errorbar(x, mean, (low, high), marker="o", ms=4, c=colour, label=names[cell])
            axis.set(xscale="log", title=which if label == "accuracy" else "")
            axis.set_xticks(lengths, [str(n) for n in lengths])
            axis.minorticks_off()
        row[0].set_ylabel(label)
    for axis in axes[1]:
        axis.set_xlabel("tokens")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    _save(figure, folder, "length")


def _training(results: Results, names: dict[Cell, str], folder: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for cell, colour in zip(MAIN, COLOURS, strict=True):
        rows = [run["training"]["loss"] for run in _runs(results, cell)]
        if rows:
            mean = np.mean(rows, 0)
            width = min(4, len(mean))
            smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
            axis.plot(np.arange(len(smooth)) + width, smooth, c=colour, label=names[cell])
    axis.set(xlabel="outer step", ylabel="outer loss", yscale="log")
    if axis.lines:
        axis.legend(fontsize=8)
    _save(figure, folder, "training")
