"""Side-by-side measurements: interleaved repetitions, ratios, peak memory in fresh processes.

A benchmark is a module with `contenders(args) -> dict[str, Callable[[], Tensor]]`: each call
returns one flat hypergradient. `main(...)` first checks that all agree, then measures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from metafocus.comparison import environment
from metafocus.measure import peak_bytes, process_memory

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""What makes glibc give blocks back when they are freed, so that a peak can be seen."""

Contenders = dict[str, Callable[[], torch.Tensor]]


def check(contenders: Contenders, reference: str, tolerance: float) -> dict[str, float]:
    """Return each contender's relative error; raise if one of ours is off."""
    exact = contenders[reference]()
    errors = {}
    for name, run in contenders.items():
        errors[name] = float((run() - exact).norm() / exact.norm())
        if name.startswith("metafocus") and not errors[name] <= tolerance:
            raise AssertionError(f"{name}: relative error {errors[name]:.1e} > {tolerance:.0e}")
    return errors


def interleaved(contenders: Contenders, reference: str, repeats: int) -> dict[str, dict]:
    """Return CPU seconds, and the quartiles of the per-repetition ratio to the reference."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(repeats + 1):
        # Shuffled: what a large contender leaves in the caches slows the one after it.
        for name in random.Random(repetition).sample(list(contenders), len(contenders)):
            run = contenders[name]
            start = time.process_time()
            run()
            if repetition:
                seconds[name].append(time.process_time() - start)
    result = {}
    for name, values in seconds.items():
        low, middle, high = quartiles(values, seconds[reference])
        result[name] = {
            "seconds": statistics.median(values),
            "ratio": middle,
            "ratio_quartiles": [low, high],
        }
    return result


def quartiles(values: list[float], base: list[float]) -> tuple[float, float, float]:
    """Return the quartiles of the per-repetition ratios of two lists of times."""
    ratios = [a / b for a, b in zip(values, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return low, middle, high


def peak_rss(script: str, name: str, arguments: list[str]) -> int | str:
    """Return the growth of the peak RSS over one call, in a fresh process; or its error."""
    run = subprocess.run(
        [sys.executable, script, "--peak", name, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **MALLOC},
    )
    if run.returncode:
        return run.stderr.strip().splitlines()[-1]
    return json.loads(run.stdout.splitlines()[-1])


def main(
    script: str,
    make: Callable[[argparse.Namespace], Contenders],
    *,
    reference: str,
    tolerance: float,
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Check, time, measure memory, print a table and write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", help="measure the memory of this contender and stop")
    parser.add_argument("--output", type=Path, help="JSON file")
    options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        torch.manual_seed(0)
        run = make(args)[args.peak]
        before = process_memory("VmRSS")
        run()
        # Not getrusage: its peak survives exec, so it would be the parent's.
        print(json.dumps(process_memory("VmHWM") - before))
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    errors = check(make(args), reference, tolerance)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    contenders = make(args)
    times = interleaved(contenders, reference, args.repeats)
    passed_on = _without(sys.argv[1:], {"--output", "--repeats"})
    peaks = {name: peak_rss(script, name, passed_on) for name in contenders}
    tensors = {name: peak_bytes(run)[1] for name, run in contenders.items()}
    rows = {
        name: {
            "error": errors[name],
            **times[name],
            "tensor_bytes": tensors[name],
            "peak_bytes": peaks[name],
        }
        for name in contenders
    }
    base = tensors[reference]
    print(f"{'':30}{'error':>9}{'CPU s':>9}{'x':>7}{'quartiles':>15}{'MB':>8}{'x':>7}  RSS MB")
    for name, row in rows.items():
        low, high = row["ratio_quartiles"]
        peak = row["peak_bytes"]
        live = row["tensor_bytes"]
        memory = f"{live / 2**20:8.1f}{live / base:7.2f}"
        memory += f"{peak / 2**20:8.1f}" if isinstance(peak, int) else f"  {peak}"
        print(
            f"{name:30}{row['error']:9.1e}{row['seconds']:9.4f}{row['ratio']:7.2f}"
            f"   [{low:4.2f}, {high:4.2f}]{memory}"
        )
    if args.output:
        report = {
            "benchmark": Path(script).stem,
            "reference": reference,
            "environment": environment(torch.get_default_dtype()),
            "repeats": args.repeats,
            "options": {
                k: v for k, v in vars(args).items() if k in ("vocabulary", "checkpointing")
            },
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


def _without(words: list[str], flags: set[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in flags:
            skip = True
        else:
            kept.append(word)
    return kept
