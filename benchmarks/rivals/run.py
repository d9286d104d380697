"""Run the comparison: `python -m benchmarks.rivals --workloads w1,w2,w3 [--quick]`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.rivals.harness import RESULTS, Race, defined, save

WEIGHED = ("process_bytes", "tensor_bytes", "flop")


def main() -> None:
    """Run the workloads and write one JSON file for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default="w1,w2,w3,w4,w7")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", help="contender files, by comma; default: all")
    parser.add_argument("--repeats", type=int, help="default: the workload's own; 0: memory alone")
    parser.add_argument("--quick", action="store_true", help="small cases, 3 repetitions")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--case", type=json.loads, default={}, help='such as {"steps": 16}')
    parser.add_argument("--keep", action="store_true", help="add to the cases in the file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory")
    args = parser.parse_args()
    only = args.only.split(",") if args.only else None
    args.output.mkdir(parents=True, exist_ok=True)
    for workload in args.workloads.split(","):
        begun, definition = time.perf_counter(), defined(workload)
        path = args.output / f"rivals_{workload}.json"
        runs = json.loads(path.read_text())["runs"] if args.keep and path.exists() else []
        for threads in map(int, args.threads.split(",")):
            torch.set_num_threads(threads)
            with tempfile.TemporaryDirectory() as folder:
                race = Race(workload, threads, only, Path(folder))
                usual = 3 if args.quick else getattr(definition, "REPEATS", 10)
                repeats = usual if args.repeats is None else args.repeats
                # The second number of threads would measure the same memory.
                again = any(run["threads"] < threads for run in runs)
                memory = not args.no_memory and not again
                try:
                    for case in definition.cases(args.quick):
                        wanted = args.case.items() <= case.items()
                        if not wanted or (again and not promised(definition, case)):
                            continue
                        day = datetime.date.today().isoformat()
                        about = {"case": case, "threads": threads, "repeats": repeats, "day": day}
                        load = os.getloadavg()[0]
                        rows = race.run(case, repeats, memory)
                        about["load"] = [load, os.getloadavg()[0]]
                        runs = merged(runs, {**about, "rows": rows})
                        show(workload, runs[-1])
                        save(path, workload, definition, sorted(runs, key=_threads))
                finally:
                    race.close()
        print(f"{workload}: {time.perf_counter() - begun:.0f} s")


def _threads(run: dict[str, Any]) -> int:
    return run["threads"]


def merged(runs: list[dict[str, Any]], run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs with this one at the end, in place of an earlier one of the same case.

    Memory, where it was not measured again, is that of the earlier one.
    """
    kept = []
    for earlier in runs:
        if (earlier["case"], earlier["threads"]) != (run["case"], run["threads"]):
            kept.append(earlier)
            continue
        for label, row in run["rows"].items():
            old = earlier["rows"].get(label, {})
            memory = {k: old[k] for k in WEIGHED if k in old}
            run["rows"][label] = {**memory, **row}
    return [*kept, run]


def promised(definition: ModuleType, case: dict[str, Any]) -> bool:
    """Return whether a target speaks of a case."""
    targets = getattr(definition, "TARGETS", [])
    return any(target.case.items() <= case.items() for target in targets)


def show(workload: str, run: dict) -> None:
    """Print the rows of one case."""
    print(f"--- {workload} {json.dumps(run['case'])} threads={run['threads']}")
    print(f"{'':30}{'error':>9}{'CPU s':>9}{'x':>7}{'quartiles':>15}{'RSS MB':>9}{'tensors':>9}")
    for label, row in run["rows"].items():
        if "seconds" not in row:
            error = f"{row['error']:.1e}" if "error" in row else ""
            print(f"{label:30}{row['verdict']} {error} {row.get('message', '')}")
            continue
        low, high = row["ratio_quartiles"]
        memory = "".join(
            f"{row[k] / 2**20:9.1f}" if row.get(k) is not None else f"{'':9}"
            for k in ("process_bytes", "tensor_bytes")
        )
        # A baseline computes another gradient, and has no error.
        error = f"{row['error']:9.1e}" if "error" in row else f"{'':9}"
        print(
            f"{label:30}{error}{row['seconds']:9.4f}{row['ratio']:7.2f}"
            f"   [{low:4.2f}, {high:4.2f}]{memory}",
            flush=True,
        )


if __name__ == "__main__":
    main()
