"""The README's table against rivals, from benchmarks/results: `make benchmarks`.

One column for a workload: CPU time over that of torch written by hand, and peak memory where it
was measured, of a rival's fastest form that computed the right gradient.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- begin rivals -->", "<!-- end rivals -->"
COLUMNS = (
    # Workload, what its case must contain, head.
    ("w1", {"steps": 5, "order": 2}, "MAML, 25 tasks"),
    ("w2", {"order": 2}, "MAML, Conv4"),
    ("w3", {"size": "deep"}, "unroll, 50 steps"),
    ("w4", {}, "implicit, CG"),
    ("w5", {"steps": 16}, "LoRA in a language model, 16 steps"),
)
ROWS = (
    # Rival, what its labels contain, name.
    ("metafocus", "", "**metafocus**"),
    ("metafocus", "recompute", "**metafocus**, recomputing"),
    ("by_hand", "", "torch by hand"),
    ("torchopt", "", "TorchOpt"),
    ("higher", "", "higher"),
    ("learn2learn", "", "learn2learn"),
    ("hypertorch", "", "hypertorch"),
    ("betty", "", "Betty"),
    ("boat", "", "BOAT"),
)
WORDS = {"absent": "not installable", "not expressible": "cannot", "failed": "fails"}


def chosen(report: dict[str, Any], case: dict[str, Any]) -> dict[str, Any] | None:
    """Return the run of a case on the fewest threads."""
    runs = [run for run in report["runs"] if case.items() <= run["case"].items()]
    return min(runs, key=lambda run: run["threads"], default=None)


def cell(rows: list[dict[str, Any]]) -> str:
    """Return what one rival did in one workload."""
    right = [row for row in rows if row.get("verdict") == "right" and "ratio" in row]
    if right:
        best = min(right, key=lambda row: row["ratio"])
        memory = max(best.get("process_bytes") or 0, best.get("tensor_bytes") or 0)
        # Below 10 MB it is the noise of a process.
        shown = f" ({memory / 2**20:.0f} MB)" if memory > 10 * 2**20 else ""
        return f"{best['ratio']:.2f}{shown}"
    wrong = [row["error"] for row in rows if row.get("verdict") == "wrong"]
    if wrong:
        return f"wrong by {min(wrong):.0e}"
    return WORDS.get(rows[0]["verdict"], rows[0]["verdict"]) if rows else ""


def table(reports: list[dict[str, Any]]) -> str:
    """Return the rivals as rows, the workloads as columns, and a sentence about the machine."""
    found = {report["workload"]: report for report in reports}
    columns = [(chosen(found[w], case), head) for w, case, head in COLUMNS if w in found]
    shown = [(run, head) for run, head in columns if run is not None]
    lines = ["| | " + " | ".join(head for _, head in shown) + " |", "|---|" + "---:|" * len(shown)]
    for rival, part, name in ROWS:
        cells = []
        for run, _ in shown:
            rows = run["rows"].items()
            cells.append(cell([r for k, r in rows if r["rival"] == rival and part in k]))
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    env = reports[0]["environment"]
    where = (
        "CPU time relative to a hand-written loop of torch.autograd, and peak memory. For each "
        "library the fastest form that computed the right gradient is shown. *wrong by*: the "
        "relative error of its gradient. *fails*: it raises an error. An empty cell: not measured. "
        f"torch {env['torch']}, {env['device']}, one thread. [Benchmarks](docs/benchmarks.md) has "
        "errors, quartiles, other cases, and the targets that were missed."
    )
    return "\n".join([*lines, "", where])


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the reports that exist, by workload."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rivals_*.json"))]


def filled(text: str, reports: list[dict[str, Any]]) -> str:
    """Return the README with what stands between the two marks renewed."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table(reports)}\n\n{END}{after}"


def main() -> None:
    """Rewrite README.md."""
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(), read()))


if __name__ == "__main__":
    main()
