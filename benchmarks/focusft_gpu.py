"""One FocuSFT step of layers as in Qwen2.5-7B on a GPU: official code against this library.

    python benchmarks/focusft_gpu.py --official PATH --output benchmarks/results/focusft_gpu.json

Random weights in bfloat16, as many layers as `--layers` says, one row of 4096 and of 32768
tokens, activation checkpointing, two inner steps. Each contender has a process of its own: median
seconds of a step after a first one, peak memory, and model FLOP utilisation, that is the products
that the method needs (without recomputation) per second over `--peak-tflops`. `--quick --device
cpu` tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from focusft_step import Size, flop, official, ours, plain, start, transformers_sft

from metafocus.comparison.memory import process_memory
from metafocus.comparison.report import environment

NAMES = ("official", "metafocus", "plain SFT, same mask", "plain SFT, transformers")
SEVEN_B = dict(
    vocabulary=152064, hidden=3584, intermediate=18944, heads=28, kv_heads=4, tied=False, rows=1
)
TINY = dict(vocabulary=512, hidden=64, intermediate=96, heads=4, kv_heads=2, tied=False, rows=1)


def measure(name: str, size: Size, path: str, repeats: int) -> dict[str, float]:
    if name.startswith("plain"):
        step = (plain if "mask" in name else transformers_sft)(size, True)
    else:
        fast = start(size)
        step = official(size, True, path, fast) if name == "official" else ours(size, True, fast)
    cuda = size.device.startswith("cuda")
    step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if cuda else process_memory("VmHWM")
    return {"seconds": statistics.median(seconds), "all_seconds": seconds, "peak_bytes": peak}


def attempt(name: str, size: Size, args: argparse.Namespace) -> dict[str, object]:
    """Measure one contender; the row says what it took, or why this machine cannot."""
    row: dict[str, object] = {"name": name, "length": size.length}
    try:
        found = measure(name, size, args.official, args.repeats)
    except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
        return {**row, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    rate = flop(size, name) / found["seconds"]
    return {**row, **found, "utilisation": rate / (args.peak_tflops * 1e12)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", required=True, help="checkout of the official code")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lengths", default="4096,32768")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="default: H100/H200, bf16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, short rows")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_default_dtype(torch.bfloat16)
    shape = TINY if args.quick else SEVEN_B
    lengths = [64, 128] if args.quick else [int(x) for x in args.lengths.split(",")]

    def size(length: int) -> Size:
        return Size(**shape, layers=args.layers, length=length, device=args.device)

    if args.one:
        for length in lengths:
            print(json.dumps(attempt(args.one, size(length), args)), flush=True)
            gc.collect()
        return
    rows = []
    for name in NAMES:
        words = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        done = subprocess.run(words, capture_output=True, text=True)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        # A process that died has told of the lengths before.
        for length in lengths[len(found) :]:
            found.append({"name": name, "length": length, "error": done.stderr[-200:]})
        rows += found
        for row in found:
            print(row, flush=True)
    if args.output:
        machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
        report = {
            "benchmark": "focusft_gpu",
            "environment": {**environment(torch.bfloat16), "device": machine},
            "layers": args.layers,
            "repeats": args.repeats,
            "rows": rows,
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
