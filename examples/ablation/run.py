"""FocuSFT's missing ablation: masks and inner loop apart, with seeds, controls and intervals.

    python examples/ablation/run.py --quick --output ablation     # minutes: shows that it runs
    python examples/ablation/run.py --scale cpu --workers 2 --output ablation   # about two hours
    python examples/ablation/run.py --scale full --output ablation              # wants a GPU

A run that is stopped goes on where it was: pre-training from its last checkpoint, the cells from
the first unfinished one. `manifest.json` lists them; `report.md` is written at the end, or at any
time with `--report`. The results in `examples/ablation/cpu` are those of docs/ablation.md:

    python examples/ablation/run.py --scale cpu --output examples/ablation/cpu --report \
        --page docs/ablation.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from base import load_base, make_base
from cells import measure, run_cell
from report import write_report
from scale import CAUSAL, SCALES, Scale
from tqdm.auto import tqdm

from metafocus.comparison.report import environment

HERE = Path(__file__).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--quick", action="store_true", help="the same as --scale quick")
    parser.add_argument("--output", type=Path, default=Path("ablation"))
    parser.add_argument("--workers", type=int, default=1, help="cells at the same time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    parser.add_argument("--page", type=Path, help="where; default: report.md in --output")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    scale = SCALES["quick" if args.quick else args.scale]
    args.output.mkdir(parents=True, exist_ok=True)
    check_same(scale, args.output)
    if args.part:
        run_part(scale, args.output, args.part, args.device)
        return
    failed = [] if args.report else run_all(scale, args.output, args.workers, args.device)
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


def run_all(scale: Scale, output: Path, workers: int, device: str) -> list[str]:
    """Run what is not finished; return the parts that failed."""
    run = {"device": device, **environment(torch.float32)}
    write_json(output / "environment.json", run)
    failed = worker(scale, output, "pretrain", device) + worker(scale, output, "base", device)
    if failed:
        return failed
    parts = [f"{cell.name}-seed{seed}" for cell, seed in scale.cells()]
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(worker, scale, output, part, device) for part in parts]
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="cells", unit="cell"):
            failed += job.result()
            write_manifest(output, parts)
    return failed


def worker(scale: Scale, output: Path, part: str, device: str) -> list[str]:
    """Run a part in a process of its own, with a log beside its result, unless it is finished."""
    if result(output, part).exists():
        return []
    command = [sys.executable, str(HERE), "--scale", scale.name, "--output", str(output)]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with (output / f"{part}.log").open("w") as log:
        code = subprocess.run(
            [*command, "--device", device, "--part", part],
            stdout=log,
            stderr=log,
            env={**os.environ, **threads},
        ).returncode
    return [part] if code else []


def run_part(scale: Scale, output: Path, part: str, device: str) -> None:
    """Run one part and write its result."""
    started, base = time.time(), output / "base-model"
    torch.manual_seed(0)
    if part == "pretrain":
        make_base(scale, base)
        write_json(result(output, part), {"seconds": time.time() - started})
        return
    model, tokenizer = load_base(base)
    model.to(device)
    if part == "base":
        found = measure(model, tokenizer, scale, CAUSAL)
    else:
        cells = {f"{cell.name}-seed{seed}": (cell, seed) for cell, seed in scale.cells()}
        cell, seed = cells[part]
        found = {"cell": asdict(cell), "seed": seed}
        found |= run_cell(model, tokenizer, scale, cell, seed)
    write_json(result(output, part), {**found, "seconds": time.time() - started})


def result(output: Path, part: str) -> Path:
    """Return where the numbers of a part are."""
    return output / "results" / f"{part}.json"


def write_manifest(output: Path, parts: list[str]) -> None:
    """Write which parts are finished, and how long they took."""
    done = {
        part: json.loads(p.read_text()) for part in parts if (p := result(output, part)).exists()
    }
    seconds = {part: round(found["seconds"], 1) for part, found in done.items()}
    missing = [part for part in parts if part not in done]
    write_json(output / "manifest.json", {"finished": seconds, "missing": missing})


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)


if __name__ == "__main__":
    main()
