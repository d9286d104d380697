"""The tables of the report: what each cell measures, as deployed and as trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from effects import (
    Effect,
    Measure,
    Results,
    Run,
    accuracy,
    everything,
    level,
    loss,
    mass,
    places,
    trained,
)
from protocol import BIDIRECTIONAL, CAUSAL, CAUSAL_INNER, CONTROLS, FOCUSFT, MAIN, Cell, Scale

from metafocus.comparison.inner_curve import diverges

NAMES = {
    CAUSAL: "causal, plain",
    BIDIRECTIONAL: "bidirectional, plain",
    CAUSAL_INNER: "causal, inner loop",
    FOCUSFT: "FocuSFT",
}


def written(found: Effect | None) -> str:
    """A mean with its interval, for a table."""
    return found.text if found else "not run"


def cell_table(scale: Scale, results: Results, base: Run) -> list[str]:
    """The untrained model and the four cells, as deployed."""
    rows: dict[str, Measure] = {
        **{f"accuracy, {name}": accuracy("deployed", *p) for name, p in places(scale).items()},
        **{f"answer loss, {name}": loss("deployed", *p) for name, p in places(scale).items()},
        "sink mass": mass("deployed", "sink_mass"),
        "largest column": mass("deployed", "max_column_mass"),
        "context engagement": mass("deployed", "context_engagement"),
        "attention on the evidence": mass("deployed", "needle_mass"),
    }
    lines = [
        "## As deployed",
        "",
        "The plain causal mask and no fast weights. Mean and 95 % bootstrap interval.",
        "",
        "| | untrained | " + " | ".join(NAMES[cell] for cell in MAIN) + " |",
        "|---|---|" + "---|" * len(MAIN),
    ]
    for title, measure in rows.items():
        cells = [level(list(trained(results, cell).values()), measure) for cell in MAIN]
        row = [f"{measure(base).mean():.3f}", *map(written, cells)]
        lines.append(f"| {title} | " + " | ".join(row) + " |")
    return [*lines, ""]


def trained_table(scale: Scale, results: Results, base: Run) -> list[str]:
    """What the mask at test time changes: the prompt under the bidirectional mask."""
    where = (scale.tasks, scale.as_trained)
    rows: dict[str, tuple[str, Measure, Measure]] = {
        f"{what}, {' and '.join(map(str, scale.as_trained))} tokens": (
            what,
            measure("deployed", *where),
            measure("training mask", *where),
        )
        for what, measure in (("accuracy", accuracy), ("answer loss", loss))
    }
    masses = {
        "sink mass": "sink_mass",
        "largest column": "max_column_mass",
        "context engagement": "context_engagement",
        "attention on the evidence": "needle_mass",
    }
    rows |= {
        title: (title, mass("deployed", name), mass("training mask", name))
        for title, name in masses.items()
    }
    lines = [
        "## As trained",
        "",
        "The prompt under the bidirectional mask, without fast weights, beside the same model as "
        "deployed (in brackets). A vanilla server is causal.",
        "",
        "| | untrained | bidirectional, plain | FocuSFT |",
        "|---|---|---|---|",
    ]
    for title, (_, deployed, mask) in rows.items():
        row = [f"{mask(base).mean():.4f} ({deployed(base).mean():.4f})"]
        for cell in (BIDIRECTIONAL, FOCUSFT):
            runs = list(trained(results, cell).values())
            one, other = level(runs, mask), level(runs, deployed)
            row.append(f"{one.mean:.4f} ({other.mean:.4f})" if one and other else "not run")
        lines.append(f"| {title} | " + " | ".join(row) + " |")
    return [*lines, ""]


def control_table(scale: Scale, results: Results) -> list[str]:
    """FocuSFT and what differs from it in one thing, as deployed."""
    lines = [
        "## Controls, one thing at a time",
        "",
        "As deployed, over all tasks and lengths. With two seeds nothing is called decided.",
        "",
        "| control | accuracy | answer loss | sink mass | last inner step | seeds |",
        "|---|---|---|---|---|---|",
    ]
    beside = [("FocuSFT itself", FOCUSFT), ("no inner loop", BIDIRECTIONAL)]
    for title, cell in [*beside, *control_cells()]:
        runs = list(trained(results, cell).values())
        row = [
            written(level(runs, accuracy("deployed", *everything(scale)))),
            written(level(runs, loss("deployed", *everything(scale)))),
            written(level(runs, mass("deployed", "sink_mass"))),
            worse_steps(runs).removeprefix("the last inner step ") or "-",
        ]
        lines.append(f"| {title} | " + " | ".join(row) + f" | {len(runs)} |")
    return [*lines, ""]


def control_cells() -> list[tuple[str, Cell]]:
    """The controls, each with what it differs in."""
    return [(f"{what}: {value(what, cell)}", cell) for what, cs in CONTROLS.items() for cell in cs]


def control_losses(scale: Scale, results: Results) -> str:
    """The extremes of the controls' answer loss beside FocuSFT's, in a sentence."""
    answers = loss("deployed", *everything(scale))

    def of(cell: Cell) -> Effect | None:
        return level(list(trained(results, cell).values()), answers)

    found = [(kept.mean, title) for title, cell in control_cells() if (kept := of(cell))]
    itself, plain = of(FOCUSFT), of(BIDIRECTIONAL)
    if not found or itself is None or plain is None:
        return ""
    (low, best), (high, worst) = min(found), max(found)
    return (
        f"The controls' answer losses lie between {low:.3f} ({best}) and {high:.3f} ({worst}), "
        f"beside {itself.mean:.3f} of FocuSFT itself and {plain.mean:.3f} without an inner loop."
    )


def value(what: str, cell: Cell) -> str:
    """What a control has of the thing that is varied."""
    return {
        "inner rate": f"{cell.rate:g}",
        "whose tokens": f"{cell.support} sample's",
        "inner tokens": cell.tokens,
        "inner steps": f"K = {cell.steps}",
        "estimator": cell.estimator,
    }[what]


def fast_weights(results: Results, base: Run) -> list[str]:
    """Own fast weights against another sample's, for every cell that has them."""
    lines = [
        "## Whose fast weights",
        "",
        "Answer loss of held-out samples of the trained tasks under the training mask: without "
        "fast weights, with those adapted to the sample, with those adapted to another sample of "
        "the task. Where the inner loop scores answers, own fast weights have seen the labels, so "
        "a low loss with them is no skill.",
        "",
        "| cell | none | own | another's |",
        "|---|---|---|---|",
    ]
    rows = {"untrained": [base], **{n: list(r.values()) for n, r in results.items()}}
    for name, runs in rows.items():
        controls = [run["control"] for run in runs if run.get("control")]
        if controls:
            means = [np.mean([c[key] for c in controls]) for key in ("none", "own", "another's")]
            lines.append(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return [*lines, ""]


def worse_steps(runs: Sequence[Run]) -> str:
    """Say how often the last inner step raised the loss that it is meant to lower.

    Support and query are the same tokens, so the outer loss is the inner loss after the last step.
    """
    curves = [
        [*inner, outer]
        for run in runs
        if run["cell"]["support"] == "own" and run["cell"]["tokens"] == "answer"
        for outer, inner in zip(run["training"]["loss"], run["training"]["inner"], strict=True)
        if inner
    ]
    if not curves:
        return ""
    worse = sum(map(diverges, curves))
    return f"the last inner step raised its loss in {worse} of {len(curves)} training steps"
