"""Measured figures inside other pages, from benchmarks/results: `make benchmarks`.

Between `<!-- begin NAME -->` and `<!-- end NAME -->` of a page stands what the function of that
name returns.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    """Return a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def compiled() -> str:
    """Return what compilation gains, and what the first call costs."""
    report = read("compiled")
    lines = [
        "| workload | estimator | eager ms | compiled ms | times as fast | first call s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        low, high = row["speedup_quartiles"]
        lines.append(
            f"| {row['workload']} | `{row['estimator']}` | {row['eager_seconds'] * 1e3:.1f} | "
            f"{row['compiled_seconds'] * 1e3:.2f} | {row['speedup']:.1f} ({low:.1f}-{high:.1f}) | "
            f"{row['first_call_seconds']:.0f} |"
        )
    at = report["environment"]
    where = (
        f"CPU time of one call: the median of {report['repeats']} calls, and in brackets the "
        f"quartiles of the ratio. One thread, torch {at['torch']}, {report['backend']}. "
        "`python benchmarks/compiled.py` measures it."
    )
    return "\n".join([*lines, "", where])


def context() -> str:
    """Return what attention and an exact step need at long contexts."""
    attention, steps = read("attention")["rows"], read("long_context")
    double = [r for r in attention if r["order"] == "double backward"]

    def longest(rows: list[dict[str, Any]], **wanted: str) -> dict[str, Any]:
        fitting = [r for r in rows if wanted.items() <= r.items() and "error" not in r]
        return max(fitting, key=lambda r: r["length"])

    def mega(row: dict[str, Any]) -> str:
        return f"{row['peak_bytes'] / 2**20:.0f} MB at {row['length']} tokens"

    eager = longest(steps["rows"], attention="eager")
    same = next(
        r for r in steps["rows"] if (r["length"], r["attention"]) == (eager["length"], "sdpa")
    )
    failed = [r for r in steps["rows"] if r["attention"] == "eager" and "error" in r]
    more = ""
    if failed:
        more = f" There eager attention ran out of {steps['limit'] / 2**30:.1f} GiB."
    return (
        "These figures are the growth of the peak memory of a fresh process. The double backward "
        f"of tiled attention takes {mega(longest(double, backend='tiled'))}; dense attention takes "
        f"{mega(longest(double, backend='dense'))}. An exact second-order FocuSFT step over spans "
        f"takes {mega(same)}, while eager attention takes "
        f"{eager['peak_bytes'] / 2**20:.0f} MB. Over spans it takes "
        f"{mega(longest(steps['rows'], attention='sdpa'))}.{more} "
        "[Benchmarks](benchmarks.md) has the tables."
    )


def recompute() -> str:
    """Return the memory of an unroll by its number of steps."""
    runs = [run for run in read("rivals_w5")["runs"] if run["threads"] == 1]
    runs.sort(key=lambda run: run["case"]["steps"])
    labels = {"`Unrolled()`": "metafocus graph"}
    labels |= {f"`Unrolled(recompute={k})`": f"metafocus recompute={k}" for k in ("True", 2)}
    labels["torch.autograd by hand"] = "torch.autograd create_graph"
    kept = [run for run in runs if run["rows"]["metafocus graph"].get("process_bytes")]
    lines = ["| | " + " | ".join(f"K = {run['case']['steps']}" for run in kept) + " |"]
    lines.append("|---|" + "---:|" * len(kept))
    for name, label in labels.items():
        found = [run["rows"].get(label, {}).get("process_bytes") for run in kept]
        if not any(found):
            continue
        cells = [f"{b / 2**20:.0f} MB" if b else "" for b in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAGES: dict[str, tuple[Callable[[], str], ...]] = {
    "compiled.md": (compiled,),
    "long_context.md": (context,),
    "estimators.md": (recompute,),
}


def filled(page: str, parts: tuple[Callable[[], str], ...]) -> str:
    """Return the page with its measured parts renewed."""
    for part in parts:
        begin, end = (f"<!-- {word} {part.__name__} -->" for word in ("begin", "end"))
        before, rest = page.split(begin)
        page = f"{before}{begin}\n\n{part()}\n\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    """Rewrite the pages."""
    for name, parts in PAGES.items():
        path = ROOT / "docs" / name
        path.write_text(filled(path.read_text(), parts))


if __name__ == "__main__":
    main()
