"""Pictures at the head of pages, drawn from results that are committed with the repository.

    python docs/figures/pages.py

`reproduction.svg` and `fewshot.svg` come from `docs/reproduction.json`; `training.svg`,
`diagnostics.svg` and `evals.svg` from the results of `examples/ablation/smollm2`. Colours can be
told apart by colour-blind readers, and markers and dashes differ as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from metafocus.comparison.figures import COLOURS
from metafocus.evals import wilson

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CELLS = ROOT / "examples" / "ablation" / "smollm2" / "results"
USUAL = {"estimator": "first-order", "tokens": "answer", "support": "own"}
"""What most cells of the ablation have in common."""
BLUE, ORANGE, GREEN, PINK = COLOURS[:4]


def claims(id: str) -> Iterator[dict[str, Any]]:
    """What the tests of a claim measured, one dict for each test."""
    for row in json.loads((HERE.parent / "reproduction.json").read_text())["rows"]:
        if row["id"] == id:
            yield row["measured"]


def cells(cell: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The finished runs of a cell of the ablation, by seed; None: of the untrained model."""
    records = [json.loads(path.read_text()) for path in CELLS.glob("*.json")]
    found = [record["result"] for record in records if record["cell"]["cell"] == cell]
    return sorted(found, key=lambda run: run.get("seed", 0))


def reproduction() -> None:
    """Truncated gradients that point the wrong way; two linear solvers at equal cost."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
    truncated = next(found for found in claims("T8") if "200" in found)
    steps = [int(k) for k in truncated]
    values = [next(iter(found.values())) for found in truncated.values()]
    left.axhline(24, color=GREEN, linestyle="--", label="true gradient: 24")
    left.axhline(0, color="grey", linewidth=0.8)
    left.plot(steps, values, "o-", color=ORANGE, label="truncated")
    left.set(xscale="log", xlabel="steps kept", ylabel="gradient")
    left.set_title("wrong sign up to 40 steps (T8)")
    left.legend()
    solvers = next(claims("T3"))[""]
    for name, colour, marker in (("Neumann", ORANGE, "s--"), ("CG", BLUE, "o-")):
        right.plot(solvers["products"], solvers[name], marker, color=colour, label=name)
    right.set(yscale="log", xlabel="Hessian products", ylabel="relative error")
    right.set_title("CG beats Neumann at equal cost (T3)")
    right.legend()
    save(figure, "reproduction")


def fewshot() -> None:
    """How four starts adapt to a new sinusoid."""
    figure, axis = plt.subplots(figsize=(5.6, 3.0))
    curves = next(claims("T13"))[""]
    marks = ("o-", "s--", "^-.", "D:")
    names = {"FOMAML": "first-order MAML", "pretrained": "trained on all tasks together"}
    for (name, losses), colour, mark in zip(curves.items(), COLOURS, marks, strict=False):
        axis.plot((0, 1, 5, 10), losses, mark, color=colour, label=names.get(name, name))
    axis.set(yscale="log", xlabel="inner steps on 10 points", ylabel="mean squared error")
    axis.set_xticks((0, 1, 5, 10))
    plainly(axis, (0.3, 1, 3))
    axis.set_title("A new sinusoid, mean of three seeds")
    axis.legend()
    save(figure, "fewshot")


def training() -> None:
    """The inner losses that a run logs, at two inner learning rates."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), sharey=True)
    for axis, rate in zip(axes, ("0.1", "1"), strict=True):
        runs = cells({"mask": "bidirectional", "steps": 2, "rate": float(rate), **USUAL})
        before, after, outer = [], [], []
        for run in runs:
            inner = run["training"]["inner"]
            before.append([losses[0] for losses in inner])
            after.append([losses[1] for losses in inner])
            outer.append(run["training"]["loss"])
        lines = (("before step 1", before), ("before step 2", after), ("after both", outer))
        marks = ((BLUE, "-"), (GREEN, "--"), (ORANGE, "-."))
        for (name, values), (colour, dash) in zip(lines, marks, strict=True):
            axis.plot(smoothed(values), dash, color=colour, label=name)
        axis.set(yscale="log", xlabel="outer step", title=f"inner learning rate {rate}")
        plainly(axis, (0.5, 1, 2, 5))
    axes[0].legend(title="answer loss", loc="upper right")
    save(figure, "training")


def plainly(axis: Any, ticks: tuple[float, ...]) -> None:
    """Label a logarithmic axis with these numbers only."""
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.yaxis.set_minor_formatter(NullFormatter())


def smoothed(runs: list[list[float]], width: int = 4) -> list[float]:
    """Mean over runs and over the last few steps."""
    means = [sum(step) / len(step) for step in zip(*runs, strict=True)]
    windows = (means[max(0, i - width + 1) : i + 1] for i in range(len(means)))
    return [sum(window) / len(window) for window in windows]


def diagnostics() -> None:
    """Attention on the first token, layer by layer, of the model before any training."""
    figure, axis = plt.subplots(figsize=(5.6, 3.0))
    attention = cells(None)[0]["attention"]
    shown = {
        "deployed": ("causal mask, as deployed", BLUE, "o-"),
        "training mask": ("FocuSFT's mask", ORANGE, "s--"),
        "with fast weights": ("FocuSFT's mask and fast weights", GREEN, "^-."),
    }
    for key, (name, colour, mark) in shown.items():
        axis.plot(attention[key]["sink_by_layer"], mark, color=colour, label=name, markersize=4)
    axis.set(yscale="log", ylim=(2e-8, 2), xlabel="layer", ylabel="attention on the first token")
    axis.set_title("Attention sink of SmolLM2-135M, answer tokens")
    axis.legend(loc="lower right")
    save(figure, "diagnostics")


def evals() -> None:
    """Accuracy by task, before and after fine-tuning, with Wilson intervals."""
    figure, axis = plt.subplots(figsize=(5.6, 3.0))
    plain = {"mask": "causal", "steps": 0, "rate": 1.0, **USUAL}
    shown = {
        "untrained": (cells(None), BLUE, "o"),
        "after 24 steps of plain fine-tuning": (cells(plain), ORANGE, "s"),
    }
    tasks = list(cells(None)[0]["scores"]["deployed"])
    for shift, (name, (runs, colour, mark)) in enumerate(shown.items()):
        for place, task in enumerate(tasks):
            right = [
                answer
                for run in runs
                for group in run["scores"]["deployed"][task]["512"]["right"]
                for answer in group
            ]
            mean = sum(right) / len(right)
            # Seeds answer the same questions, so they do not make the interval narrower.
            low, high = wilson(mean, len(right) // len(runs))
            label = f"{name}, {len(runs)} seed{'s' * (len(runs) > 1)}" if place == 0 else None
            spread = [[mean - low], [high - mean]]
            axis.errorbar(place + shift / 4, mean, spread, fmt=mark, color=colour, label=label)
    axis.set_xticks([i + 1 / 8 for i in range(len(tasks))], tasks)
    axis.set(ylabel="accuracy", ylim=(-0.02, 1.25), title="SmolLM2-135M, 512 tokens, 95 % interval")
    axis.legend(loc="upper left")
    save(figure, "evals")


def save(figure: Any, name: str) -> None:
    """Write a figure without what differs from run to run."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    figure.savefig(f"/tmp/{name}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    matplotlib.rcParams |= {"svg.hashsalt": "metafocus", "font.size": 10, "legend.fontsize": 8.5}
    matplotlib.rcParams["axes.titlesize"] = 10.5
    for draw in (reproduction, fewshot, training, diagnostics, evals):
        draw()
