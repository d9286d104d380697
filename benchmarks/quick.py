"""Compare ratios with the committed ones, and say what moved: `make benchmarks-quick`.

Ratios and not seconds, so that the machine matters little: of this library to torch by hand (W1,
W4, W3), of a FocuSFT step to a plain one (W6), and of the modelled step on a GPU, which has no
noise at all. A few minutes of one thread; a ratio counts as moved beyond 15 %, which is the noise
of so few repetitions, and a modelled figure beyond 1 %.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import focusft_step
from benchmarks.roofline import __main__ as roofline
from benchmarks.roofline import steps

RESULTS = Path(__file__).resolve().parent / "results"
NOISE = 0.15
RACES = {
    "w1": {"steps": 5, "order": 2},
    "w3": {"size": "published", "steps": 50},
    "w4": {"products": 20},
}
"""One case of each workload, on one thread."""


class Figure(NamedTuple):
    """A figure now, and the committed one."""

    what: str
    now: float
    before: float
    noise: float

    def __str__(self) -> str:
        """Return the line that is printed."""
        change = self.now / self.before - 1
        moved = "" if abs(change) <= self.noise else "  SLOWER" if change > 0 else "  faster"
        return f"{self.what:58}{self.before:9.3f}{self.now:9.3f}{change:+8.1%}{moved}"


def races() -> list[Figure]:
    """Return the ratios of this library to torch by hand."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for workload, case in RACES.items():
            words = [sys.executable, "-m", "benchmarks.rivals", "--workloads", workload]
            words += ["--only", "by_hand,metafocus", "--threads", "1", "--repeats", "5"]
            words += ["--no-memory", "--case", json.dumps(case), "--output", folder]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            now = _ratios(Path(folder), workload, case)
            before = _ratios(RESULTS, workload, case)
            found += [
                Figure(f"{workload} {label} / by hand", now[label], before[label], NOISE)
                for label in now
                if label in before
            ]
    return found


def _ratios(folder: Path, workload: str, case: dict[str, object]) -> dict[str, float]:
    runs = json.loads((folder / f"rivals_{workload}.json").read_text())["runs"]
    run = next(r for r in runs if r["threads"] == 1 and case.items() <= r["case"].items())
    return {
        label: row["ratio"]
        for label, row in run["rows"].items()
        if label.startswith("metafocus") and "ratio" in row
    }


def step() -> list[Figure]:
    """Return the ratio of a FocuSFT step to a plain step with the same mask."""
    runs = json.loads((RESULTS / "rivals_w6.json").read_text())["runs"]
    found = []
    for checkpointing in (False, True):
        case = {"vocabulary": 4096, "checkpointing": checkpointing}
        rows = next(r["rows"] for r in runs if r["threads"] == 1 and r["case"] == case)
        size = focusft_step.Size()
        ours = focusft_step.ours(size, checkpointing, focusft_step.start(size))
        plain = focusft_step.plain(size, checkpointing)
        ratios = []
        for i in range(4):
            ratio = _seconds(ours) / _seconds(plain)
            if i:
                ratios.append(ratio)
        before = rows["metafocus"]["seconds"] / rows["plain SFT, same mask"]["seconds"]
        word = "with" if checkpointing else "without"
        what = f"w6 FocuSFT / plain, {word} checkpointing"
        found.append(Figure(what, statistics.median(ratios), before, NOISE))
    return found


def _seconds(run: object) -> float:
    begin = time.process_time()
    run()  # pyright: ignore[reportCallIssue]
    return time.process_time() - begin


def modelled() -> list[Figure]:
    """Return the modelled seconds of a step on a GPU."""
    kept = json.loads(roofline.CHANGES.read_text())
    before = {(row["name"], row["length"]): row for entry in kept for row in entry["rows"]}
    found = []
    for name in (steps.OURS, steps.PLAIN):
        ops = roofline.operations(name, 4096)
        now, then = roofline.row(name, 4096, ops), before[name, 4096]
        for figure in ("seconds", "gigabytes", "teraflop", "kernels"):
            what = f"roofline {name}, 4096 tokens, {figure}"
            found.append(Figure(what, now[figure], then[figure], 0.01))
    return found


def main() -> None:
    """Print each figure before and now."""
    torch.set_num_threads(1)
    print(f"{'':58}{'before':>9}{'now':>9}{'change':>8}")
    for part in (modelled, races, step):
        for figure in part():
            print(figure, flush=True)


if __name__ == "__main__":
    main()
