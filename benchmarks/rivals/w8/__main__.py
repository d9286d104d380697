"""W8: benchopt's bilevel benchmark: `python -m benchmarks.rivals.w8`.

Its own simulated problem, its own solvers; `python -m benchmarks.rivals.install benchopt` first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.rivals import install
from benchmarks.rivals.harness import RESULTS, ROOT, rounded
from benchmarks.rivals.w8 import ours
from benchmarks.rivals.w8.problem import GOAL, SIZES
from metafocus.comparison.report import environment


def main() -> None:
    """Run both sides, one after the other, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=60.0, help="CPU seconds of one run")
    parser.add_argument("--only", default="", help="part of a name; other rows are kept")
    parser.add_argument("--output", type=Path, default=RESULTS / "w8.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    facts = install.manifest().get("benchopt", {"error": "not installed"})
    if "error" in facts:
        raise SystemExit(f"benchopt's benchmark: {facts['error']}")
    with tempfile.TemporaryDirectory() as folder:
        data, found = Path(folder) / "data.npz", Path(folder) / "rows.json"
        words = ["-m", "benchmarks.rivals.w8.theirs", facts["path"], data, found]
        words += [args.limit, args.only]
        settings = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), facts["path"]]),
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        }
        # In a folder of its own: it leaves a cache where it runs.
        subprocess.run(
            [facts["python"], *map(str, words)],
            cwd=folder,
            env={**os.environ, **settings},
            check=True,
        )
        theirs = json.loads(found.read_text())
        arrays = dict(np.load(data))
    rows = theirs["rows"] + ours.rows(arrays, args.limit, args.only)
    if args.only:
        kept = json.loads(args.output.read_text())["rows"]
        rows = [row for row in kept if args.only not in row["name"]] + rows
    report = {
        "benchmark": "w8",
        "environment": {**environment(torch.float64), "threads": 1, "jax": theirs["jax"]},
        "version": facts["version"],
        "sizes": SIZES,
        "goal": GOAL,
        "limit": args.limit,
        "load": [load, os.getloadavg()[0]],
        "rows": rows,
    }
    args.output.write_text(json.dumps(rounded(report), indent=1) + "\n")


if __name__ == "__main__":
    main()
