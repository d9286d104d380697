"""Write docs/benchmarks.md from benchmarks/results/*.json: `python -m benchmarks.report`."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import before, gpu, half_precision, modelled
from benchmarks.rivals import context, report
from benchmarks.rivals.w8 import report as w8

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
FIGURES = ROOT / "docs/figures/benchmarks"
LINK = "figures/benchmarks"
OPENING = """
This page compares metafocus with a loop of torch by hand and with other libraries. For each it says
whether the gradient is right, and how much time and memory it takes. Then come long contexts,
half precision, and what runs on a GPU.
"""
INTRODUCTION = """
The page is written by `make benchmarks` from `benchmarks/results/`:
`python -m benchmarks.rivals.install`, then
`python -m benchmarks.rivals`, `python -m benchmarks.rivals.w8` and the scripts named below make
these files. All numbers were measured on a CPU, except those of two sections: one was measured on a
GPU, and one models a GPU. `make benchmarks-quick` compares ratios with the committed ones.
"""


def page() -> str:
    """Return the page, and write its plots."""

    def read(name: str) -> dict:
        return json.loads((RESULTS / f"{name}.json").read_text())

    long = context.lines(read("attention"), read("long_context"), FIGURES, LINK)
    lines = ["# Benchmarks", "", f"{_flow(OPENING)} {report.finding(RESULTS)}", ""]
    lines += [
        f"![CPU time of MAML relative to torch by hand, by library]({LINK}/rivals_w1.svg)",
        "",
        "*MAML on 25 tasks: CPU time relative to a loop of torch by hand.*",
        "",
        _flow(INTRODUCTION),
    ]
    lines += report.sections(RESULTS, FIGURES, LINK, {"w7": long})
    if (RESULTS / "w8.json").exists():
        lines += w8.section(read("w8"), FIGURES, LINK)
    lines += before.section(read("before"))
    lines += gpu.section(read("focusft_gpu"), read("attention_gpu"))
    lines += modelled.section(read("focusft_gpu"), read("roofline"))
    lines += half_precision.section(read("half_precision"))
    return "\n".join(lines) + "\n"


def _flow(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    """Write the page."""
    (ROOT / "docs/benchmarks.md").write_text(page())


if __name__ == "__main__":
    main()
