"""Draws the diagrams of the pages: `python docs/figures/make.py`.

The masks are those of `metafocus.masks`; the measured figure is drawn from `tradeoffs.json`, which
`docs/figures/tradeoffs.py` writes. Both then fill in the tables of `docs/choosing.md`.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from ladder import choosing, choosing_narrow  # noqa: E402
from svg import PINK, STYLES, Drawing  # noqa: E402

import metafocus as mf  # noqa: E402


def one_idea() -> Drawing:
    """Problem, solver and estimator make one function, which is used in three ways."""
    d = Drawing(560, 366, "Problem, solver and estimator make one scalar function")
    columns = (
        (0, "slow", ("**Problem", "inner and outer", "loss, start")),
        (196, "fast", ("**Solver", "how the fast", "weights move")),
        (392, "pink", ("**Estimator", "how they depend", "on the slow ones")),
    )
    for x, style, lines in columns:
        d.box(x + 2, 2, 164, 86, lines, style, size=14.5)
        d.line([(x + 82, 90), (x + 82 if x == 196 else 280 + (x - 196) * 0.45, 128)])
    for x in (182, 377):
        d.text(x, 45, "+", size=26)
    d.box(
        60, 132, 440, 70, ("`meta(outer, episode) -> (loss, aux)", "one ordinary scalar function")
    )
    ways = (("loss.backward()", 0), ("torch.func.grad", 196), ("vmap, over_tasks", 392))
    for words, x in ways:
        d.line([(280 + (x - 196) * 0.75, 204), (x + 82, 242)])
        d.box(x + 2, 246, 160, 42, f"`{words}", "plain", size=15)
        d.line([(x + 82, 290), (280 + (x - 196) * 0.75, 318)], color=PINK)
    d.box(60, 322, 440, 42, "its derivative is the hypergradient you chose", "pink", size=16)
    return d


def estimators() -> Drawing:
    """For each estimator: the forward pass in grey, the backward path in pink."""
    rows = (
        ("Unrolled()", "back through every inner step: exact", "all"),
        ("Unrolled(last=2)", "the last two steps; before them a constant", "last"),
        ("FirstOrder()", "inner steps are constants", "none"),
        ("Implicit(CG(n))", "one linear system at the solution", "implicit"),
        ("Penalty(strength)", "a second, nudged solution; first derivatives only", "penalty"),
        ("Evolution(meta, ...)", "values only: no derivative at all", "values"),
    )
    height = 112
    d = Drawing(560, height * len(rows) + 6, "What the derivative passes through")
    xs = [150 + 72 * i for i in range(5)]
    for i, (name, words, kind) in enumerate(rows):
        top = i * height
        y = top + 74
        d.rect(2, top + 4, 196, 27, "plain", radius=6, stroke=0)
        d.text(100, top + 17.5, name, size=14.5, color=STYLES["plain"][2], mono=True)
        d.text(208, top + 17.5, words, size=14.5, anchor="start")
        dim = "4 4" if kind == "values" else ""
        d.line([(74, y), (xs[0] - 20, y)], dash=dim)
        for a, b in itertools.pairwise(xs):
            d.line([(a + 19, y), (b - 20, y)], dash=dim)
        d.line([(xs[-1] + 19, y), (500, y)], dash=dim)
        below = y + 12
        if kind == "all":
            for a, b in zip([502, *xs[::-1]], [*xs[::-1], 72], strict=True):
                edge = 16 if b != 72 else 0
                d.line([(a - (16 if a != 502 else 0), below), (b + edge, below)], color=PINK)
        elif kind == "last":
            for a, b in ((502, xs[4]), (xs[4], xs[3]), (xs[3], xs[2])):
                d.line([(a - (16 if a != 502 else 0), below), (b + 16, below)], color=PINK)
            d.curve((xs[2] - 12, below + 4), (xs[0] + 12, below + 4), -9, color=PINK, dash="5 4")
            d.line([(xs[0] - 16, below), (72, below)], color=PINK)
        elif kind == "none":
            d.line([(502, below), (xs[4] + 16, below)], color=PINK)
            d.curve((xs[4] - 12, below + 4), (xs[0] + 12, below + 4), -9, color=PINK, dash="5 4")
            d.line([(xs[0] - 16, below), (72, below)], color=PINK)
        elif kind in ("implicit", "penalty"):
            d.line([(502, below), (xs[4] + 16, below)], color=PINK)
            d.curve((xs[4] - 10, below + 5), (72, below), -11, color=PINK)
        for shift in (12, 6) if kind == "values" else ():
            d.rect(2 + shift / 2, y - 18 - shift, 70, 36, "slow", dash="3 3")
        d.box(2, y - 18, 70, 36, "slow", "slow")
        for j, x in enumerate(xs):
            d.circle(x, y, 18, "fast", f"fast{'₀₁₂₃₄'[j]}", size=12.5)
        if kind == "penalty":
            d.circle(xs[4] + 14, y - 19, 10, "pink")
        d.box(504, y - 18, 54, 36, "loss", "good")
    return d


def focusft() -> Drawing:
    """From the bottom: shared layers, two inner steps and the outer pass, the gradient."""
    d = Drawing(560, 420, "One step of FocuSFT")
    d.box(
        2, 352, 556, 64, ("**lower layers: run once per batch", "no fast weights in them"), "slow"
    )
    passes = (("inner step 1", "₀"), ("inner step 2", "₁"), ("outer pass", "₂"))
    for i, (words, index) in enumerate(passes):
        x = 2 + i * 197
        last = i == 2
        d.line([(x + 81, 350), (x + 81, 316)], dash="" if last else "5 4")
        d.text(x + 88, 334, "attached" if last else "detached", size=14, anchor="start")
        d.box(x, 196, 162, 116, ("**upper layers", "slow weights", "", ""), "slow")
        d.box(x + 14, 254, 134, 46, f"+ fast{index}", "fast", size=16)
        d.line([(x + 81, 194), (x + 81, 154)])
        d.box(x, 96, 162, 54, ("answer loss", words), "good" if last else "plain")
    for x in (164, 361):  # from a loss to the fast weights of the next pass
        d.path(f"M{x} 123 C{x + 34} 123 {x + 2} 277 {x + 45} 277")
    d.line([(477, 94), (477, 62)], color=PINK)
    d.box(250, 4, 308, 54, ("gradient of the slow weights", "as the estimator says"), "pink")
    d.box(2, 4, 218, 54, ("afterwards the fast", "weights are thrown away"), "fast")
    return d


def masks() -> Drawing:
    """The same 14 tokens under four policies of the library: which keys (right) a query sees."""
    turns = [0] * 5 + [1] * 2 + [2] * 4 + [3] * 3
    batch = {
        "input_ids": torch.zeros(1, len(turns), dtype=torch.long),
        "turn_ids": torch.tensor([turns]),
        "answer_mask": torch.tensor([[t % 2 == 1 for t in turns]]),
    }
    policies = (
        ("causal", mf.masks.causal),
        ("sliding_window(4)", mf.masks.sliding_window(4)),
        ("prefix_lm", mf.masks.prefix_lm),
        ("context_bidirectional", mf.masks.context_bidirectional),
    )
    cell, n = 17, len(turns)
    d = Drawing(560, 2 * (n * cell + 62) + 40, "Mask policies")
    for i, (name, policy) in enumerate(policies):
        left, top = 20 + (i % 2) * 290, 36 + (i // 2) * (n * cell + 62)
        d.text(left + n * cell / 2, top - 20, name, size=15.5, mono=True)
        seen = policy(batch).dense()[0, 0]
        for q in range(n):
            answer = bool(batch["answer_mask"][0, q])
            style = "fast" if answer else "slow"
            for k in range(n):
                fill = STYLES[style][1] if seen[q, k] else "#c9d0d8"
                opacity = "" if seen[q, k] else ' opacity="0.35"'
                d.parts.append(
                    f'<rect x="{left + k * cell}" y="{top + q * cell}" width="{cell - 2}" '
                    f'height="{cell - 2}" rx="2" fill="{fill}"{opacity}/>'
                )
            for x, y, w, h in (
                (left - 9, top + q * cell, 5, cell - 2),
                (left + q * cell, top - 9, cell - 2, 5),
            ):
                d.parts.append(
                    f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{STYLES[style][1]}"/>'
                )
    y = d.height - 12
    for x, style, words in ((120, "slow", "context sees"), (310, "fast", "answer sees")):
        d.parts.append(
            f'<rect x="{x}" y="{y - 7}" width="14" height="14" fill="{STYLES[style][1]}"/>'
        )
        d.text(x + 22, y, words, size=15, anchor="start")
    return d


def short(value: float) -> str:
    """Two digits, without an exponent."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def tradeoffs(report: dict) -> Drawing:
    """Error, time and memory of each estimator, as dots on logarithmic scales."""
    panels = [p for p in report["problems"] if p["draw"]]
    count = sum(len(p["rows"]) for p in panels)
    d = Drawing(560, count * 25 + len(panels) * 98, "Measured error, time and memory")
    top = 0
    for panel in panels:
        d.text(2, top + 14, panel["title"], size=16, anchor="start", bold=True)
        rows, top = panel["rows"], top + 68
        errors = [max(r["relative_error"] or 0, 1e-7) for r in rows]
        seconds = [1e3 * r["seconds"] for r in rows]
        memory = [r["peak_bytes"] / 2**20 for r in rows]
        for x, unit, words, values, color in (
            (214, "", "error", errors, PINK),
            (332, " ms", "time", seconds, STYLES["slow"][1]),
            (450, " MB", "memory", memory, STYLES["good"][1]),
        ):
            low, high = math.log10(min(values)), math.log10(max(values))
            d.text(x, top - 31, words, size=14, anchor="start")
            least = "0" if unit == "" else short(min(values))
            d.text(x, top - 14, f"{least} to {short(max(values))}{unit}", size=12.5, anchor="start")
            d.line([(x, top - 3), (x, top + 25 * len(rows) - 6)], head=False, width=1)
            for i, value in enumerate(values):
                place = x + 6 + (math.log10(value) - low) / max(high - low, 0.5) * 92
                y = top + 8 + 25 * i
                d.line([(x, y), (place, y)], head=False, width=1, dash="2 3")
                d.parts.append(f'<circle cx="{place:.1f}" cy="{y}" r="6" fill="{color}"/>')
        for i, row in enumerate(rows):
            d.text(208, top + 8 + 25 * i, row["name"], size=13, anchor="end", mono=True)
        top += 25 * len(rows) + 30
    return d


def table(problem: dict) -> str:
    """The rows of one comparison as a Markdown table."""
    lines = [
        "| estimator | error | cosine | ms | peak MB | verdict |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for r in problem["rows"]:
        error = "0" if r["relative_error"] == 0 else f"{r['relative_error']:.1e}"
        lines.append(
            f"| `{r['name']}` | {error} | {r['cosine']:.3f} | {1e3 * r['seconds']:.0f} | "
            f"{r['peak_bytes'] / 2**20:.2f} | {r['verdict']} |"
        )
    return "\n".join(lines)


def filled(page: str, report: dict) -> str:
    """The page with what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` renewed."""
    for problem in report["problems"]:
        begin, end = (f"<!-- {word} {problem['name']} -->" for word in ("begin", "end"))
        before, rest = page.split(begin)
        _, after = rest.split(end)
        env = problem["environment"]
        where = (
            f"{problem['what']} Reference: `{problem['reference']}`. torch {env['torch']}, "
            f"{env['device']}, {env['threads']} thread, {env['dtype']}."
        )
        page = f"{before}{begin}\n\n{where}\n\n{table(problem)}\n\n{end}{after}"
    return page


def main() -> None:
    """Draw all figures and fill in the tables."""
    for draw in (one_idea, estimators, choosing, choosing_narrow, focusft, masks):
        draw().save(HERE / f"{draw.__name__}.svg")
    report = json.loads((HERE / "tradeoffs.json").read_text())
    tradeoffs(report).save(HERE / "tradeoffs.svg")
    page = HERE.parent / "choosing.md"
    page.write_text(filled(page.read_text(), report))


if __name__ == "__main__":
    main()
