"""Print the modelled time of a step of 8 layers as in Qwen2.5-7B, and what it is made of.

    python -m benchmarks.roofline                                 # ours and plain steps
    python -m benchmarks.roofline --change "what was changed"     # and keep the figures
    python -m benchmarks.roofline --official CHECKOUT             # record the official step anew
    python -m benchmarks.roofline --largest 20 --steps metafocus  # where the time goes

It needs no GPU: see `benchmarks/roofline/machine.py` for what the figures are.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.roofline import official, steps
from benchmarks.roofline.machine import H200, WITHOUT_WAITING
from benchmarks.roofline.record import KERNEL, SYNC, Op
from metafocus.attention.kernels import flash

LENGTHS = (4096, 32768)
SLICES = 6
"""Of the two context turns and the two answers of a row."""
RESULTS = Path(__file__).resolve().parents[1] / "results"
CHANGES = RESULTS / "roofline.json"
MEASURED_AS = {
    steps.OFFICIAL: "official",
    steps.OURS: "metafocus",
    steps.PLAIN: "plain SFT, same mask",
    steps.TRANSFORMERS: "plain SFT, transformers",
}
"""The names in `focusft_gpu.json`."""


def measured() -> dict[tuple[str, int], float]:
    """Return the seconds of each step on an H200, before any change in `roofline.json`."""
    rows = json.loads((RESULTS / "focusft_gpu.json").read_text())["rows"]
    names = {there: here for here, there in MEASURED_AS.items()}
    return {(names[row["name"]], row["length"]): row["seconds"] for row in rows}


def operations(name: str, length: int) -> list[Op]:
    """Return the operations of a step: recorded now, or in the file of the official code.

    Where two kinds of kernels serve attention, those of the shorter time, as it is on a GPU.
    """
    if name == steps.OFFICIAL:
        return official.read(length)
    if name == steps.TRANSFORMERS:
        return steps.record(name, length).ops
    tried = (False, True) if SLICES * flash.LONG <= length else (False,)
    ways = [steps.record(name, length, slices=slices).ops for slices in tried]
    return min(ways, key=H200.seconds)


def row(name: str, length: int, ops: list[Op]) -> dict[str, Any]:
    """Return the figures of a step."""
    kernels = [op for op in ops if op.kind == KERNEL]
    return {
        "name": name,
        "length": length,
        "kernels": len(kernels),
        "gigabytes": round(sum(op.bytes for op in kernels) / 1e9, 1),
        "teraflop": round(sum(op.flops for op in kernels) / 1e12, 1),
        "synchronisations": dict(Counter(op.name for op in ops if op.kind == SYNC)),
        "seconds": round(H200.seconds(ops), 4),
        "seconds_of_kernels": round(WITHOUT_WAITING.seconds(ops), 4),
    }


def shown(row: dict[str, Any], seconds: float) -> str:
    """Return a line of the table."""
    return (
        f"{row['name']:13}{row['length']:7}{row['kernels']:9}{row['gigabytes']:9.1f}"
        f"{row['teraflop']:9.1f}{sum(row['synchronisations'].values()):7}"
        f"{row['seconds_of_kernels']:10.4f}{row['seconds']:10.4f}{seconds:10.4f}"
    )


def largest(ops: list[Op], number: int) -> list[str]:
    """Return what takes the device the longest, alike operations together."""
    taken: Counter[tuple[str, str, str]] = Counter()
    count: Counter[tuple[str, str, str]] = Counter()
    for op in (op for op in ops if op.kind == KERNEL):
        what = (op.name, op.dtype, " ".join(str(list(shape)) for shape in op.shapes[:3]))
        taken[what] += H200.kernel(op) + H200.gap
        count[what] += 1
    return [
        f"  {1e3 * t:8.2f} ms {count[what]:5} x {' '.join(what)}"
        for what, t in taken.most_common(number)
    ]


def main() -> None:
    """Record, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", default=",".join(steps.NAMES))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--official", default="", help="checkout of the official code")
    parser.add_argument("--change", default="", help="append the rows to results/roofline.json")
    parser.add_argument("--largest", type=int, default=0, help="operations to list for each step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.official:
        official.write({n: steps.record(steps.OFFICIAL, n, args.official).ops for n in LENGTHS})
    on_device, rows = measured(), []
    print(
        f"{'step':13}{'tokens':>7}{'kernels':>9}{'GB':>9}{'TFLOP':>9}{'waits':>7}"
        f"{'kernels s':>10}{'model s':>10}{'measured':>10}"
    )
    for length in map(int, args.lengths.split(",")):
        for name in args.steps.split(","):
            ops = operations(name, length)
            rows.append(row(name, length, ops))
            print(shown(rows[-1], on_device[name, length]), flush=True)
            print(*largest(ops, args.largest), sep="\n", end="\n" * bool(args.largest))
    if args.change:
        kept = json.loads(CHANGES.read_text()) if CHANGES.exists() else []
        kept.append({"change": args.change, "rows": rows})
        CHANGES.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
