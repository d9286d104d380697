"""This library beside an earlier state of itself: what has become slower since.

    git worktree add /tmp/earlier COMMIT
    python -m benchmarks.before /tmp/earlier --workloads w1,w2,w3,w4,w5,w6

The contenders of this library, of both states, on the cases of the comparison: each state in a
process of its own, with the benchmark as it was. The gradients of both are compared in float64.
Then their repetitions interleave in random order, and each ratio is taken within a repetition.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.rivals.harness import BLOCK, ROOT, Worker, defined, quartiles, rounded
from metafocus.comparison.report import environment

RESULT = ROOT / "benchmarks/results/before.json"
NOISE = 0.03
"""A ratio within this distance of 1 is none: equal kernels differ by so much."""


class State:
    """One of the two states of the library."""

    def __init__(self, root: Path, threads: int):
        facts = {"python": sys.executable}
        self.worker = Worker("metafocus", facts, threads, root=root)

    def load(self, workload: str, case: dict[str, Any], data: str, dtype: str) -> list[str]:
        """Make the contenders of a case; return their labels."""
        request = {"workload": workload, "case": case, "data": data, "dtype": dtype}
        return self.worker.ask("load", **request)["names"]

    def gradient(self, label: str, folder: Path) -> torch.Tensor:
        """Return the hypergradient."""
        path = folder / "gradient.pt"
        self.worker.ask("gradient", name=label, to=str(path))
        return torch.load(path)

    def seconds(self, label: str, calls: int) -> float:
        """Return the CPU time of a call."""
        return self.worker.ask("time", name=label, calls=calls)["cpu"]


def rows(
    states: dict[str, State], workload: str, case: dict[str, Any], repeats: int, folder: Path
) -> dict[str, Any]:
    """Return the times of both states and their ratio, by contender.

    Raises:
        AssertionError: if their gradients differ.
    """
    definition = defined(workload)
    path = folder / "data.pt"

    def shared(case: dict[str, Any], dtype: str) -> list[str]:
        torch.manual_seed(0)
        torch.save(definition.data(case), path)
        names = [state.load(workload, case, str(path), dtype) for state in states.values()]
        return [label for label in names[0] if label in names[1]]

    check_case = getattr(definition, "check_case", lambda case: case)
    for label in shared(check_case(case), "float64"):
        before, now = (state.gradient(label, folder) for state in states.values())
        torch.testing.assert_close(now, before, rtol=1e-6, atol=1e-9, msg=label)
    labels = shared(case, getattr(definition, "DTYPE", "float32"))
    pairs = [(name, label) for label in labels for name in states]
    calls, times = {}, {pair: [] for pair in pairs}
    for name, label in pairs:
        states[name].seconds(label, 1)
        calls[label] = min(100, max(1, math.ceil(BLOCK / states[name].seconds(label, 1))))
    for repetition in range(repeats):
        for name, label in random.Random(repetition).sample(pairs, len(pairs)):
            times[name, label].append(states[name].seconds(label, calls[label]))
    found = {}
    for label in labels:
        before, now = (times[name, label] for name in states)
        low, middle, high = quartiles(now, before)
        found[label] = {"before": statistics.median(before), "now": statistics.median(now)}
        found[label] |= {"ratio": middle, "quartiles": [low, high]}
    return found


def section(report: dict[str, Any]) -> list[str]:
    """Return the part of the page."""
    lines = [
        "## Beside an earlier state",
        "",
        f"The code of {report['date']} (`{report['commit']}`) and that of {report['day']}, each in "
        "a process of its own, repetitions interleaved on one thread, gradients equal "
        "(`python -m benchmarks.before CHECKOUT`). A ratio above 1 is slower than before, bold "
        f"beyond {NOISE:.0%}, by which equal kernels differ. What is slower is what lasts a few "
        "milliseconds: each call checks more than it did, which takes about 0.1 ms. A loop over "
        "tasks needs the memory of one task now, where it kept the graphs of all; for that it "
        "looks through the graph of each task and stores its adapted weights, 0.1 to 0.2 ms each.",
        "",
        "| | case | contender | CPU ms before | now | ratio | quartiles |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for run in report["runs"]:
        case = ", ".join(f"{k} {v}" for k, v in run["case"].items())
        for label, row in run["rows"].items():
            low, high = row["quartiles"]
            slower = "**" if row["ratio"] > 1 + NOISE and low > 1 else ""
            lines.append(
                f"| {run['workload'].upper()} | {case} | {label} | {1e3 * row['before']:.4g} | "
                f"{1e3 * row['now']:.4g} | {slower}{row['ratio']:.2f}{slower} | "
                f"{low:.2f}-{high:.2f} |"
            )
    return [*lines, ""]


def main() -> None:
    """Run the workloads and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="an earlier state, with its benchmarks")
    parser.add_argument("--workloads", default="w1,w2,w3,w4,w5,w6")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--case", type=json.loads, default={}, help='such as {"steps": 5}')
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)

    def git(*words: str) -> str:
        words = ("git", "-C", str(args.checkout), *words)
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

    report = {"benchmark": "before", "environment": environment(torch.float32)}
    report |= {
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": git("log", "-1", "--format=%as"),
    }
    report |= {"day": datetime.date.today().isoformat(), "runs": []}
    states = {"before": State(args.checkout.resolve(), 1), "now": State(ROOT, 1)}
    for workload in args.workloads.split(","):
        for case in defined(workload).cases(False):
            if not args.case.items() <= case.items():
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = rows(states, workload, case, args.repeats, Path(folder))
            report["runs"].append({"workload": workload, "case": case, "rows": found})
            args.output.write_text(json.dumps(rounded(report), indent=1) + "\n")
            for label, row in found.items():
                print(f"{workload} {json.dumps(case)} {label:28}{row['ratio']:6.2f}", flush=True)
    for state in states.values():
        state.worker.close()


if __name__ == "__main__":
    main()
