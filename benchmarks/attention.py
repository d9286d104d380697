"""Attention over spans on a CPU, tiles against the whole matrix: memory and time by length.

    python benchmarks/attention.py --output benchmarks/results/attention.json

    python benchmarks/attention.py --choices

One row, 2 heads of 32, float32, context turns and causal answers. Each figure of memory is the
growth of the peak RSS of a fresh process; time is CPU time, repetitions interleaved. `--choices`
prints what two constants were chosen by: the size of a tile, and the length up to which "auto" is
dense.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.func import grad, jvp

from metafocus.attention import span_attention
from metafocus.attention.kernels import tiles
from metafocus.comparison.memory import process_memory
from metafocus.comparison.report import environment
from metafocus.masks.spans import Spans

ORDERS = ("backward", "double backward", "forward over reverse")
BACKENDS = ("flash", "tiled", "dense")


def turns(length: int, count: int = 4, answers: float = 0.25) -> Spans:
    """Context turns that see each other, each followed by a causal answer."""
    index = torch.arange(length)
    size = length // count
    context = size - int(size * answers)
    inside = index % size
    block = index - inside + context
    stop = torch.where(inside < context, block, index + 1).clamp(max=length)
    return Spans(torch.zeros(1, length, dtype=torch.long), stop[None])


def inputs(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, length, 32, generator=generator) for _ in range(3)]


def run(order: str, backend: str, length: int) -> None:
    args, spans = inputs(length), turns(length)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return span_attention(q, k, v, spans, backend=backend).square().sum()

    if order == "forward over reverse":
        jvp(grad(loss, (0, 1, 2)), tuple(args), tuple(args))
        return
    args = [x.requires_grad_() for x in args]
    twice = order == "double backward"
    first = torch.autograd.grad(loss(*args), args, create_graph=twice)
    if twice:
        torch.autograd.grad(sum(g.square().sum() for g in first), args)


def peak(order: str, backend: str, length: int) -> int | str:
    """Growth of the peak RSS over one call, in a fresh process."""
    words = [sys.executable, __file__, "--peak", order, backend, str(length)]
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **malloc})
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"killed by signal {-done.returncode}"
    return int(done.stdout.split()[-1])


def seconds(order: str, backends: list[str], length: int, repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    for repetition in range(repeats + 1):
        for backend in backends:
            start = time.process_time()
            run(order, backend, length)
            if repetition:
                times[backend].append(time.process_time() - start)
    return {backend: statistics.median(values) for backend, values in times.items()}


def choices(repeats: int) -> None:
    """Time by the size of a tile, and of short rows by back end."""
    for order in ORDERS[:2]:
        for length in (1024, 2048, 4096):
            times: dict[int, list[float]] = {}
            for _ in range(repeats):
                for bits in range(15, 22):
                    tiles.CAPACITY = 1 << bits
                    start = time.process_time()
                    run(order, "tiled", length)
                    times.setdefault(bits, []).append(time.process_time() - start)
            shown = ", ".join(f"2^{b} {1e3 * min(t):.0f}" for b, t in times.items())
            print(f"{order:18}{length:6} ms by numbers in a tile: {shown}", flush=True)
    tiles.CAPACITY = 1 << 18
    for order in ORDERS[:2]:
        for length in (16, 32, 64, 128, 256):
            times = seconds(order, ["dense", "tiled"], length, 10 * repeats)
            shown = ", ".join(f"{b} {1e3 * t:.2f}" for b, t in times.items())
            print(f"{order:18}{length:6} ms: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--dense-up-to", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--choices", action="store_true", help="time what constants depend on")
    parser.add_argument("--peak", nargs=3, metavar=("ORDER", "BACKEND", "LENGTH"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        order, backend, length = args.peak
        run(order, backend, 64)  # What is allocated once.
        before = process_memory("VmRSS")
        run(order, backend, int(length))
        print(process_memory("VmHWM") - before)
        return
    if args.choices:
        choices(args.repeats)
        return
    rows = []
    for order in ORDERS:
        for length in map(int, args.lengths.split(",")):
            backends = [b for b in BACKENDS if b != "dense" or length <= args.dense_up_to]
            times = seconds(order, backends, length, args.repeats)
            for backend in backends:
                memory = peak(order, backend, length)
                row = dict(order=order, backend=backend, length=length, peak_bytes=memory)
                rows.append({**row, "seconds": times[backend]})
                shown = f"{memory / 2**20:8.0f} MB" if isinstance(memory, int) else memory
                print(f"{order:22}{backend:7}{length:6}{times[backend]:8.2f} s{shown}", flush=True)
    if args.output:
        report = {
            "benchmark": "attention",
            "environment": environment(torch.float32),
            "repeats": args.repeats,
            "rows": rows,
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
