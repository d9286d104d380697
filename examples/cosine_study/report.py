"""The page: findings in one paragraph, then a table by rate, a figure and all points."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from points import EPSILON, Point, grid

from metafocus.comparison import ALIGNED
from metafocus.comparison.inner_curve import diverges

Found = dict[str, Any]
COLOURS = ("#4c6a92", "#c0504d", "#7f9a48", "#8064a2")


def write_report(output: Path, page: Path) -> str:
    """Write the page and its figure from the results that are there; return its first part."""
    found = read(output)
    folder = page.parent / "figures" / "cosine"
    folder.mkdir(parents=True, exist_ok=True)
    draw(found, folder)
    head = [*opening(found), *by_rate(found)]
    lines = [*head, *pictures(), *trust(found), *all_points(found), *method(found)]
    page.write_text("\n".join(lines) + "\n")
    return "\n".join(head)


def read(output: Path) -> list[Found]:
    """Return the finished points, in a fixed order."""
    found = [json.loads(path.read_text()) for path in output.glob("*.json")]
    if not found:
        raise SystemExit(f"{output} holds no finished point: run the study first")
    # Settings first, so that neighbours in the table differ in the rate.
    return sorted(found, key=lambda f: (*map(str, setting(f)), f["point"]["rate"]))


def setting(found: Found) -> tuple[Any, ...]:
    """What a point has besides its rate."""
    point = found["point"]
    return point["mask"], point["steps"], point["tokens"], point["sample"]


def usable(found: Found) -> bool:
    """Whether the first-order hypergradient points in the right direction."""
    return found["cosine"] >= ALIGNED


def flagged(found: Found) -> bool:
    """The trust check: the loss after the last inner step is above the one before it."""
    return diverges(found["losses"])


def referee(found: Found) -> float | None:
    """How far the measured slopes are from the exact hypergradient, in units of its norm."""
    if not found["slope"]:
        return None
    slopes = found["slope"].values()
    return max(abs(s["measured"] - s["exact"]) for s in slopes) / found["norm"]["exact"]


def refuted(found: Found) -> float | None:
    """How far the measured slope along the exact direction is from what first order says."""
    if not found["slope"]:
        return None
    slope = found["slope"]["along exact"]
    return abs(slope["measured"] - slope["first-order"]) / found["norm"]["exact"]


def opening(found: Sequence[Found]) -> list[str]:
    """The findings in one paragraph."""
    rates = sorted({f["point"]["rate"] for f in found})
    fine = [r for r in rates if all(usable(f) for f in found if f["point"]["rate"] == r)]
    wrong = [r for r in rates if any(not usable(f) for f in found if f["point"]["rate"] == r)]
    paper = [f["cosine"] for f in found if f["point"]["rate"] == 1.0]
    right = sum(flagged(f) != usable(f) for f in found)
    failed = [f for f in found if not usable(f)]
    warned = sum(map(flagged, failed))
    alarms = sum(map(flagged, found)) - warned
    sentences = [
        "FocuSFT trains with the first-order hypergradient. Here it is compared with the exact "
        f"one, on SmolLM2-135M (a dequantised 4-bit copy), at {len(found)} points (inner rates: "
        f"{len(rates)}; chats: {len({f['point']['sample'] for f in found})}; settings of mask, "
        f"steps and length: {len({setting(f)[:3] for f in found})})."
    ]
    checked = [value for f in found if (value := referee(f)) is not None]
    if checked:
        sentences.append(
            f"Central differences, at {len(checked)} of them, agree with the exact one to "
            f"{100 * max(checked):.1f} % of its norm."
        )
    safe = [rate for rate in fine if not wrong or rate < min(wrong)]
    if safe:
        sentences.append(
            f"**At inner rates up to {max(safe):g} it has the right direction at every point that "
            f"was measured (cosine at least {ALIGNED:g}).**"
        )
    if wrong:
        sentences.append(f"From a rate of {min(wrong):g} on it fails at some points.")
    if paper:
        sentences.append(
            f"At the paper's rate of 1 its cosine with the exact one is {min(paper):.2f} to "
            f"{max(paper):.2f}, with a median of {np.median(paper):.2f}."
        )
    else:
        sentences.append("The paper's rate of 1 has not been measured yet.")
    sentences.append(
        "The trust check, which needs no second derivative, asks whether the loss after the last "
        f"inner step is above the one before; it says the right thing at {right} of {len(found)} "
        f"points: it warns at {warned} of the {len(failed)} where the first order fails, and at "
        f"{alarms} of the others."
    )
    if not wrong:
        sentences.append(
            "That says little so far: the first order fails at none of them, so the check had no "
            "failure to find."
        )
    return ["# Is the first-order gradient of FocuSFT usable?", "", " ".join(sentences), ""]


def by_rate(found: Sequence[Found]) -> list[str]:
    """One line for each inner rate, over all settings."""
    lines = [
        "| inner rate | points | cosine: median (range) | exact norm / first-order norm | usable "
        "| last step raised the loss |",
        "|---|---|---|---|---|---|",
    ]
    for rate in sorted({f["point"]["rate"] for f in found}):
        some = [f for f in found if f["point"]["rate"] == rate]
        ratio = [f["norm"]["exact"] / f["norm"]["first-order"] for f in some]
        lines.append(
            f"| {rate:g} | {len(some)} | {spread([f['cosine'] for f in some])} | {spread(ratio)} "
            f"| {count(some, usable)} | {count(some, flagged)} |"
        )
    return [*lines, ""]


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{np.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def count(found: Sequence[Found], which: Callable[[Found], bool]) -> str:
    """How many of how many."""
    return f"{sum(map(which, found))} of {len(found)}"


def pictures() -> list[str]:
    """The figure and its caption."""
    caption = (
        "Left: the cosine of first-order and exact hypergradient against the inner rate; one line "
        f"for each chat and setting, the dashed line is {ALIGNED:g}. Right: the same cosine "
        "against what the trust check sees, the loss after the last inner step divided by the one "
        "before it"
    )
    return [f"![{caption}](figures/cosine/cosine.png)", "", f"*{caption}.*", ""]


def trust(found: Sequence[Found]) -> list[str]:
    """The trust check against the truth."""
    both = {
        (said, is_usable): sum(flagged(f) == said and usable(f) == is_usable for f in found)
        for said in (False, True)
        for is_usable in (False, True)
    }
    return [
        "## Does the trust check predict it?",
        "",
        f"| | cosine at least {ALIGNED:g} | below |",
        "|---|---|---|",
        f"| last step lowered the loss | {both[False, True]} | {both[False, False]} |",
        f"| last step raised the loss | {both[True, True]} | {both[True, False]} |",
        "",
        "A point in the upper right is one that the check misses: the loss falls, although the "
        "first-order hypergradient is wrong.",
        "",
    ]


def all_points(found: Sequence[Found]) -> list[str]:
    """Every point."""
    lines = [
        "## All points",
        "",
        "Losses are those before each inner step and after the last one. Central differences are "
        "the referee at the first chat of each setting: the fifth column is the largest "
        "difference between a measured slope and that of the exact hypergradient, relative to its "
        "norm. The last one is the same for first order, along the exact direction.",
        "",
        "| mask, K, tokens, chat | rate | cosine | losses | exact off by | first order off by |",
        "|---|---|---|---|---|---|",
    ]
    for f in found:
        point = f["point"]
        name = f"{point['mask']}, {point['steps']}, {f['tokens']}, {point['sample']}"
        losses = ", ".join(f"{x:.2f}" for x in f["losses"])
        lines.append(
            f"| {name} | {point['rate']:g} | {f['cosine']:.3f} | {losses} | {share(referee(f))} "
            f"| {share(refuted(f))} |"
        )
    return [*lines, ""]


def share(value: float | None) -> str:
    """A percentage, or a dash where nothing was measured."""
    return "-" if value is None else f"{100 * value:.1f} %"


def method(found: Sequence[Found]) -> list[str]:
    """How it was done, and what is missing."""
    names = {Point(**f["point"]).name for f in found}
    missing = [point.name for point in grid() if point.name not in names]
    lines = [
        "## Method",
        "",
        "SmolLM2-135M-Instruct, a dequantised 4-bit copy, in float32. One chat about the standard "
        "library is support and query, as in FocuSFT: LoRA of rank 32 on the MLPs of the top 35 % "
        "of layers, SGD, each tensor's gradient clipped to norm 1. The hypergradient is that of "
        "all weights of the model. The exact one is `mf.Unrolled(recompute=True)`. The referee "
        f"moves all weights by {EPSILON:g} along a unit direction, both ways.",
        "",
        "```bash",
        "python examples/cosine_study/run.py --output examples/cosine_study/results",
        "python examples/cosine_study/run.py --output examples/cosine_study/results --report \\",
        "    --page docs/cosine.md",
        "```",
    ]
    if missing:
        lines += ["", f"Not run so far: {', '.join(missing)}."]
    return lines


def draw(found: Sequence[Found], folder: Path) -> None:
    """Write the figure as PNG and SVG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    kinds = sorted({setting(f)[:3] for f in found}, key=str)
    for i, kind in enumerate(kinds):
        mask, steps, tokens = kind
        label = f"{mask}, K = {steps}, {tokens} tokens"
        look = {"c": COLOURS[i % len(COLOURS)], "marker": "os^Dv"[i // len(COLOURS) % 5], "ms": 4}
        for sample in sorted({setting(f)[3] for f in found if setting(f)[:3] == kind}):
            some = [f for f in found if setting(f) == (*kind, sample)]
            x, y = [f["point"]["rate"] for f in some], [f["cosine"] for f in some]
            left.plot(x, y, label=label, **look)
            ratio = [f["losses"][-1] / f["losses"][-2] for f in some]
            right.plot(ratio, y, ls="", **look)
            label = None
    for axis in (left, right):
        axis.axhline(ALIGNED, c="0.7", ls="--", lw=1, zorder=0)
        axis.set_xscale("log")
    right.axvline(1.0, c="0.7", ls="--", lw=1, zorder=0)
    left.set(xlabel="inner rate", ylabel="cosine of first-order and exact")
    right.set(xlabel="loss after the last inner step / before it")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(folder / "cosine.png", dpi=120)
    # The same results give the same file.
    with plt.rc_context({"svg.hashsalt": "cosine"}):
        figure.savefig(folder / "cosine.svg", metadata={"Date": None})
    plt.close(figure)
