"""FocuSFT's missing ablation: masks and inner loop apart, with seeds, controls and intervals.

    python examples/ablation/run.py --quick --output ablation     # a minute: shows that it runs
    python examples/ablation/run.py --scale smollm2 --output examples/ablation/smollm2
    python examples/ablation/run.py --scale full --output ablation-full    # wants a GPU

Each cell is one file in `results`, written whole when the cell is finished. A run that is stopped
goes on with the first cell that has none; several processes share one output directory. The report
can be written at any time, from whatever is there:

    python examples/ablation/run.py --scale smollm2 --output examples/ablation/smollm2 --report \
        --page docs/ablation.md
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cells import Bench, measure, train
from model import checksum, load
from protocol import FOCUSFT, SCALES, Cell, Scale
from report import write_report

from metafocus.comparison import environment
from metafocus.errors import NonFiniteError
from metafocus.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="smollm2")
    parser.add_argument("--quick", action="store_true", help="the same as --scale quick")
    parser.add_argument("--output", type=Path, default=Path("ablation"))
    parser.add_argument("--model", default="", help="a directory or hub id in place of the scale's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    parser.add_argument("--page", type=Path, help="where; default: report.md in --output")
    args = parser.parse_args()
    scale = SCALES["quick" if args.quick else args.scale]
    args.output.mkdir(parents=True, exist_ok=True)
    check_same(scale, args.output)
    failed = [] if args.report else run_all(scale, args.output, args.model, args.device)
    print(write_report(scale, args.output, args.page))
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}; run the same command again")


def check_same(scale: Scale, output: Path) -> None:
    """Refuse to mix two experiments in one directory."""
    path = output / "scale.json"
    mine = json.loads(json.dumps(asdict(scale)))
    if path.exists() and json.loads(path.read_text()) != mine:
        sys.exit(f"--output {output} holds a run of other settings: name another directory")
    write_json(path, mine)


def run_all(scale: Scale, output: Path, source: str, device: str) -> list[str]:
    """Run what is not finished; return the parts that failed."""
    model, tokenizer = load(scale, source, device)
    weights = checksum(model)
    bench = Bench(scale, tokenizer, device)
    write_json(
        output / "environment.json",
        {"device": device, "weights": weights, **environment(torch.float32)},
    )
    start = {name: value.detach().clone() for name, value in model.named_parameters()}

    def base(progress: Callable[[str], None]) -> dict[str, Any]:
        return measure(model, bench, scale, FOCUSFT)

    def of(cell: Cell, seed: int) -> Callable[[Callable[[str], None]], dict[str, Any]]:
        def run(progress: Callable[[str], None]) -> dict[str, Any]:
            with torch.no_grad():
                for name, value in model.named_parameters():
                    value.copy_(start[name])
            found: dict[str, Any] = {"cell": asdict(cell), "seed": seed}
            try:
                found["training"] = train(model, tokenizer, scale, cell, seed, progress)
            except NonFiniteError as error:
                return {**found, "diverged": str(error)}  # a result too
            progress("measuring")
            return {**found, **measure(model, bench, scale, cell, seed)}

        return run

    cells = scale.cells()
    parts = {"base": base, **{f"{c.name}-seed{s}": of(c, s) for c, s in cells}}
    failed = []
    for i, (name, part) in enumerate(parts.items()):
        path = output / "results" / f"{name}.json"
        if not run_part(path, part, f"[{i}/{len(cells)}] {name}", {"weights": weights}):
            failed.append(name)
    return failed


def run_part(
    path: Path,
    part: Callable[[Callable[[str], None]], dict[str, Any]],
    label: str,
    known: dict[str, Any],
) -> bool:
    """Run one part and write its file, unless it is there or another process is at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()

    def progress(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {label}: {line}", flush=True)

    # The lock ends with the process, so nothing is left to clean up after a crash.
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        if path.exists():
            return True
        try:
            found = part(progress)
        except Exception:
            traceback.print_exc()
            return False
        seconds = time.time() - started
        write_json(path, {**known, **found, "seconds": seconds}, indent=1)
        progress(f"finished in {seconds:.0f} s")
        return True


if __name__ == "__main__":
    main()
