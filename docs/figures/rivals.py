"""The README's table against rivals, from benchmarks/results: `python docs/figures/rivals.py`.

For each workload the heaviest case on one thread: CPU time over that of the reference, of a rival's
fastest form that computed the right gradient.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- begin rivals -->", "<!-- end rivals -->"


def heaviest(report: dict[str, Any]) -> dict[str, Any]:
    """Return the run on the fewest threads whose reference took longest."""
    fewest = min(run["threads"] for run in report["runs"])
    runs = [run for run in report["runs"] if run["threads"] == fewest]
    return max(runs, key=lambda run: run["rows"][report["reference"]].get("seconds", 0.0))


def cell(rows: list[dict[str, Any]]) -> str:
    """Return what one rival did in one workload."""
    right = [row["ratio"] for row in rows if row.get("verdict") == "right" and "ratio" in row]
    if right:
        return f"{min(right):.2f}"
    wrong = [row["error"] for row in rows if row.get("verdict") == "wrong"]
    if wrong:
        return f"wrong by {min(wrong):.0e}"
    return rows[0]["verdict"] if rows else "-"


def table(reports: list[dict[str, Any]]) -> str:
    """Return the rivals as rows, the workloads as columns, and a sentence about the machine."""
    runs = [(report, heaviest(report)) for report in reports]
    rivals: dict[str, list[str]] = {}
    for index, (_, run) in enumerate(runs):
        of: dict[str, list[dict[str, Any]]] = {}
        for row in run["rows"].values():
            of.setdefault(row["rival"], []).append(row)
        for rival, rows in of.items():
            rivals.setdefault(rival, ["-"] * len(runs))[index] = cell(rows)
    names = sorted(rivals, key=lambda name: (name != "metafocus", name != "by_hand", name))
    heads = [
        f"{report['title']} ({', '.join(f'{k} {v}' for k, v in run['case'].items())})"
        for report, run in runs
    ]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(runs)]
    for name in names:
        shown = "**metafocus**" if name == "metafocus" else name.replace("_", " ")
        lines.append(f"| {shown} | " + " | ".join(rivals[name]) + " |")
    env = reports[0]["environment"]
    where = (
        f"CPU time relative to torch written by hand; each gradient is compared first. torch "
        f"{env['torch']}, {env['device']}, one thread. *absent*: cannot be installed here; *not "
        "expressible*: the library has no way to say it. All cases: "
        "[benchmarks](docs/benchmarks.md)."
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
