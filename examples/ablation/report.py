"""The report: findings in one paragraph, the paper's claims in one table, then the numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import figures
import numpy as np
from claims import VERDICTS, Claim, claims
from effects import (
    FEWEST_SEEDS,
    Results,
    Run,
    accuracy,
    as_trained,
    effect,
    everything,
    loss,
    trained,
)
from protocol import CAUSAL, FOCUSFT, MAIN, Cell, Scale
from tables import (
    NAMES,
    cell_table,
    control_losses,
    control_table,
    fast_weights,
    trained_table,
    worse_steps,
)

PAGES = {
    "quick": "ablation_quick.md",
    "smollm2": "ablation.md",
    "smollm2-100": "ablation_100.md",
    "full": "ablation_full.md",
}
"""The file of each scale's report in `docs`."""


def write_report(scale: Scale, output: Path, page: Path | None = None) -> str:
    """Write `report.md` (or `page`) and its figures from the results; return its first part."""
    base, results = read(output)
    page = page or output / "report.md"
    pictures = page.parent / "figures" / page.stem
    pictures.mkdir(parents=True, exist_ok=True)
    captions = figures.draw(scale, base, results, NAMES, pictures)
    found = claims(scale, results, base)
    start, table = opening(scale, results, base, found), claim_table(found)
    lines = [
        *start,
        *picture_lines(captions, page.stem),
        *table,
        *cell_table(scale, results, base),
        *trained_table(scale, results, base),
        *control_table(scale, results),
        *fast_weights(results, base),
        *method(scale, output, results),
    ]
    page.write_text("\n".join(lines) + "\n")
    return "\n".join([*start, *table])


def read(output: Path) -> tuple[Run, Results]:
    """Return the untrained model's measurements and those of every finished cell."""
    records = [json.loads(path.read_text()) for path in (output / "results").glob("*.json")]
    # A run that began before there was a sweep has files of the results alone.
    found = [run for run in (record.get("result", record) for record in records) if run]
    base = [run for run in found if not run.get("cell")]
    if not base:
        raise SystemExit(f"{output}/results has no untrained model: run the experiment first")
    results: Results = {}
    for run in sorted((run for run in found if run.get("cell")), key=_order):
        results.setdefault(Cell(**run["cell"]).name, {})[run["seed"]] = run
    return base[0], results


def _order(run: Run) -> tuple[str, int]:
    return Cell(**run["cell"]).name, run["seed"]


def opening(scale: Scale, results: Results, base: Run, found: Sequence[Claim]) -> list[str]:
    """The findings in one paragraph: what was done, the verdicts, and the figures that matter."""
    model = "SmolLM2-135M-Instruct (a dequantised 4-bit copy)" if scale.model else "a tiny model"
    seeds = [len(trained(results, cell)) for cell in MAIN]
    finished = ", ".join(f"{n} ({NAMES[cell]})" for cell, n in zip(MAIN, seeds, strict=True))
    counts = {verdict: sum(claim.verdict == verdict for claim in found) for verdict in VERDICTS}
    told = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    sink = {way: np.mean(base["attention"][way]["sink_mass"]) for way in base["attention"]}
    sentences = [
        f"{model} was fine-tuned as a whole for {scale.steps} steps of one chat of {scale.length} "
        "tokens, in four ways: with a causal or a bidirectional mask, and with or without an inner "
        f"loop. FocuSFT has both. Finished seeds: {finished}. The table lists {len(found)} "
        "statements that make up the paper's claims. They are about the deployed model, which has "
        "the causal mask and no fast weights, unless they say otherwise. The verdicts, for this "
        f"model: **{told}**.",
        f"Before training, answers give the first token {sink['deployed']:.3f} of their "
        f"attention under the causal mask and {sink['training mask']:.4f} under the bidirectional "
        "one.",
    ]
    after = {
        name: {
            way: np.mean([np.mean(run["attention"][way]["sink_mass"]) for run in runs])
            for way in ("deployed", as_trained(cell))
        }
        for cell, name in NAMES.items()
        if (runs := trained(results, cell).values())
    }
    if after:
        told = ", ".join(f"{masses['deployed']:.3f} ({name})" for name, masses in after.items())
        sentences.append(f"In the deployed models after training, they give it {told}.")
    if NAMES[FOCUSFT] in after:
        seen = after[NAMES[FOCUSFT]]["with fast weights"]
        sentences.append(f"With FocuSFT's own mask and fast weights, they give it {seen:.4f}.")
    if min(seeds) < FEWEST_SEEDS:
        sentences.append(
            f"With fewer than {FEWEST_SEEDS} paired seeds, a statement about trained models is "
            "undecided, whatever its interval."
        )
    for what, measure in (("accuracy", accuracy), ("answer loss", loss)):
        gain = effect(results, FOCUSFT, CAUSAL, measure("deployed", *everything(scale)))
        if gain:
            sentences.append(
                f"Over all tasks and lengths, FocuSFT changes the {what} of the deployed model by "
                f"{gain.difference} (95 % interval) against causal fine-tuning."
            )
    worse = worse_steps(list(trained(results, FOCUSFT).values()))
    if worse:
        sentences.append(f"In FocuSFT, at the paper's inner rate of 1, {worse}.")
    sentences.append(control_losses(scale, results))
    title = f"# The ablation of FocuSFT: {scale.steps} steps"
    return [title, "", " ".join(sentences).strip(), ""]


def claim_table(found: Sequence[Claim]) -> list[str]:
    """The claims of the paper, what was measured, and the verdict."""
    lines = ["| statement | published | measured, 95 % interval | seeds | verdict |"]
    lines.append("|---|---|---|---|---|")
    for claim in found:
        text = claim.show(claim.found) if claim.found else "-"
        seeds = "untrained" if claim.fewest == 1 else claim.found.seeds if claim.found else 0
        row = (claim.text, claim.published, text, str(seeds), f"**{claim.verdict}**")
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""]


def picture_lines(captions: dict[str, str], folder: str) -> list[str]:
    """The figures, each with its caption."""
    lines = []
    for name, caption in captions.items():
        lines += [f"![{caption}](figures/{folder}/{name}.png)", "", f"*{caption}.*", ""]
    return lines


def method(scale: Scale, output: Path, results: Results) -> list[str]:
    """How it was done, in the words of the settings, and what is missing."""
    at = json.loads((output / "environment.json").read_text())
    cells = [(f"{cell.name}, seed {seed}", cell, seed) for cell, seed in scale.cells()]
    missing = [name for name, cell, seed in cells if seed not in results.get(cell.name, {})]
    diverged = [
        f"{name} (seed {seed}): {run['diverged']}"
        for name, runs in results.items()
        for seed, run in runs.items()
        if "diverged" in run
    ]
    sizes = ", ".join(f"{n} at {length} tokens" for length, n in scale.chats.items())
    lines = [
        "## Method",
        "",
        "The protocol (`examples/ablation/protocol.py`) was fixed before any cell was trained; its "
        "sizes follow from the measured cost of a step. One number changed afterwards: two cells "
        "of 32 steps had been trained, and were thrown away because of a fault (autocast reused "
        "stale weights), before the steps were cut to [24](ablation.md) for the budget. Cells of "
        "[100 steps](ablation_100.md) were added when those of 24 had been seen; nothing else "
        "differs. The page says nothing about larger models. The SHA-256 of the weights begins "
        f"with `{at['weights'][:16]}`. "
        f"Trained tasks: {', '.join(scale.trained)}; held out: "
        f"{', '.join(scale.held_out)}. Chats of each task: {sizes}, each with up to {scale.turns} "
        "questions; earlier answers stand in the chat as they should be. An answer is right if "
        "greedy decoding gives it exactly, end token included. Runs of one seed share the chats, "
        "their order and the fast weights' start. AdamW with peak learning rate "
        f"{scale.lr:g}, one chat a step, products in bfloat16, weights in float32. Inner loop: "
        "LoRA of rank 32 on the MLPs of the top 35 % of layers, SGD with rate 1, each tensor's "
        "gradient clipped to norm 1, first order, K = 2, where not varied. Attention is that of "
        f"{scale.profiled * len(scale.tasks)} chats with one question, of {scale.length} tokens. "
        "Intervals draw seeds and chats anew, the same for both cells of a difference; with three "
        "seeds they are rather too narrow. A claim is supported or contradicted if its interval "
        "lies on one side of the bound; with fewer than three seeds it is undecided. With many "
        "claims at 95 %, one in twenty would be decided by chance alone.",
        "",
        "Go on with what is missing, and write this page again:",
        "",
        "```bash",
        f"python examples/ablation/run.py --scale {scale.name} --output examples/ablation/"
        f"{scale.name}",
        f"python examples/ablation/run.py --scale {scale.name} --output examples/ablation/"
        f"{scale.name} \\",
        f"    --report --page docs/{PAGES[scale.name]}",
        "```",
    ]
    if diverged:
        lines += ["", f"Diverged in training: {'; '.join(diverged)}."]
    if missing:
        lines += ["", f"Not run so far: {'; '.join(missing)}."]
    return lines
