"""W7's third axis, the length of the context, from two benchmarks with scripts of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.rivals import plots

ATTENTION = """
One row, 2 heads of 32, float32, four context turns and causal answers (`benchmarks/attention.py`).
*dense* forms the matrix; *tiled* and *flash* read spans. Memory is the growth of the peak RSS of a
fresh process.
"""
STEP = """
FocuSFT with `Unrolled(recompute=True)`, K = 2, on a Qwen2 of 4 layers with LoRA on the MLPs of all
of them, so below attention too (`benchmarks/long_context.py`). *spans* is a model loaded as usual
(sdpa), whose attention `lm_loss` replaces; *eager* forms every matrix.
"""


def lines(attention: dict[str, Any], step: dict[str, Any], figures: Path, link: str) -> list[str]:
    """Return the sections, and write their plot."""
    figures.mkdir(parents=True, exist_ok=True)
    path = plots.saved(plot(attention, step), figures / "rivals_w7_context.svg")
    text = ["", "**Growth with the context**", ""]
    text += [f"![Time and memory against the length of the context]({link}/{path.name})"]
    text += ["", "Attention: " + _flow(ATTENTION), "", *by_length(attention)]
    text += ["", "An exact second-order step: " + _flow(STEP), "", *steps(step)]
    return text


def plot(attention: dict[str, Any], step: dict[str, Any]) -> Figure:
    """Return time and memory against the length."""
    figure = Figure(figsize=(12.5, 3.8), layout="constrained")
    panels = figure.subplots(1, 4)
    double = [r for r in attention["rows"] if r["order"] == "double backward"]
    for i, (key, unit, word) in enumerate((("seconds", 1, "CPU s"), ("peak_bytes", 2**20, "MB"))):
        for backend in dict.fromkeys(r["backend"] for r in double):
            rows = [r for r in double if r["backend"] == backend]
            x, y = [r["length"] for r in rows], [r[key] / unit for r in rows]
            panels[i].plot(x, y, marker="o", label=backend)
        for kind in dict.fromkeys(r["attention"] for r in step["rows"]):
            rows = [r for r in step["rows"] if r["attention"] == kind and "error" not in r]
            x, y = [r["length"] for r in rows], [r[key] / unit for r in rows]
            panels[i + 2].plot(x, y, marker="o", label=_named(kind))
        plots.axes(panels[i], "tokens", f"attention, double backward: {word}")
        plots.axes(panels[i + 2], "tokens", f"exact FocuSFT step: {word}")
    for panel in panels:
        panel.legend(fontsize=8, frameon=False)
    return figure


def by_length(report: dict[str, Any]) -> list[str]:
    """Return the table of attention."""
    rows = {(r["order"], r["backend"], r["length"]): r for r in report["rows"]}
    lengths = sorted({r["length"] for r in report["rows"]})
    head = "| | back end | " + " | ".join(f"{n} tokens" for n in lengths) + " |"
    text = [head, "|---|---|" + "---|" * len(lengths)]
    for order, backend in dict.fromkeys((r["order"], r["backend"]) for r in report["rows"]):
        found = [rows.get((order, backend, length)) for length in lengths]
        cells = [f"{r['peak_bytes'] / 2**20:.0f} MB, {r['seconds']:.2f} s" if r else "not run"
                 for r in found]  # fmt: skip
        text.append(f"| {order} | {backend} | " + " | ".join(cells) + " |")
    return text


def steps(report: dict[str, Any]) -> list[str]:
    """Return the table of exact steps."""
    text = ["| tokens | attention | CPU s | peak MB | gradient norm |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        start = f"| {row['length']} | {_named(row['attention'])} | "
        if "error" in row:
            limit = f"needs more than the {report['limit'] / 2**30:.1f} GiB that it was given"
            text.append(f"{start}{limit} | | |")
        else:
            text.append(
                f"{start}{row['seconds']:.1f} | {row['peak_bytes'] / 2**20:.0f} | "
                f"{row['gradient_norm']:.6f} |"
            )
    return text


def _named(attention: str) -> str:
    return "spans" if attention == "sdpa" else attention


def _flow(text: str) -> str:
    return " ".join(text.split())
