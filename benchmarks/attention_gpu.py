"""W5: FocuSFT's attention at 32k tokens on a GPU, first and second order.

    python benchmarks/attention_gpu.py          # writes benchmarks/results/attention_gpu.json
    python benchmarks/attention_gpu.py --device cpu --quick   # seconds; prints only

Eight context turns, each bidirectional and seeing all before it, and eight causal answers that are
a quarter of the tokens; 28 query heads, 4 key heads of 128, bfloat16. First order: forward and
gradient, against `F.scaled_dot_product_attention` with an additive mask `[B, 1, S, S]` and repeated
key heads, as transformers calls it. Second order: the gradient of a product with the gradient.
Times are of CUDA events, interleaved, with masks and spans made before; memory is the peak of the
allocator in a process of its own, with the mask in it, as a model holds it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import metafocus as mf
from metafocus.attention import span_attention
from metafocus.comparison.memory import process_memory
from metafocus.comparison.report import environment
from metafocus.masks.spans import Spans

RESULTS = Path(__file__).parent / "results" / "attention_gpu.json"
CONTEXT_TURNS, ANSWERS = 8, 0.25

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def focus_spans(length: int, device: str) -> Spans:
    """Eight times a context turn and an answer."""
    place = torch.arange(length) * CONTEXT_TURNS
    turn, inside = place.div(length, rounding_mode="floor"), place % length
    answer = inside >= (1 - ANSWERS) * length
    batch = {"input_ids": turn, "turn_ids": 2 * turn + answer, "answer_mask": answer}
    return mf.masks.context_bidirectional({k: v[None].to(device) for k, v in batch.items()})


def dense_mask_sdpa(spans: Spans, dtype: torch.dtype) -> Attend:
    """The mask of the official code: additive, `[B, 1, S, S]`, shared by all layers."""
    mask = spans.dense(dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def backend(name: str, spans: Spans) -> Attend:
    return lambda q, k, v: span_attention(q, k, v, spans, backend=name)


class Case:
    """One computation: made late, so that its memory can be measured from the start."""

    def __init__(self, args: argparse.Namespace, order: int, length: int, contender: str):
        self.dtype = getattr(torch, args.dtype)
        spans = focus_spans(length, args.device)
        heads = (args.heads, args.heads, args.kv, args.kv)
        torch.manual_seed(0)
        shapes = [(1, length, h, args.size) for h in heads]
        made = [torch.randn(s, device=args.device).to(self.dtype).transpose(1, 2) for s in shapes]
        self.do, *inputs = made
        self.inputs = [x.requires_grad_() for x in inputs]
        ways = [torch.randn_like(x) for x in inputs] if order == 2 else []
        dense = contender == "sdpa, dense mask"
        self.attend = dense_mask_sdpa(spans, self.dtype) if dense else backend(contender, spans)
        self.ways = ways

    def __call__(self) -> Tensor:
        """The first or second derivative, flat."""
        out = self.attend(*self.inputs)
        second = bool(self.ways)
        found = torch.autograd.grad(out, self.inputs, self.do, create_graph=second)
        if second:
            found = torch.autograd.grad(found, self.inputs, self.ways)
        return torch.cat([x.flatten() for x in found])


def cases(args: argparse.Namespace) -> list[tuple[int, int, list[str]]]:
    """Order, length, contenders; the first one is the reference of times."""
    short = args.length // 4
    first = ["sdpa, dense mask", "flash", "tiled"] + ["flex"] * (args.device == "cuda")
    return [(1, args.length, first), (2, short, ["dense", "tiled"]), (2, args.length, ["tiled"])]


def attempt(run: Callable[[], object]) -> str | None:
    """Run it; return the error that says why this machine cannot."""
    try:
        run()
    except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def errors(args: argparse.Namespace) -> dict[str, float]:
    """Relative error of each contender, at a length where float32 and a dense mask are cheap."""
    length, found = args.check, {}
    exact_args = argparse.Namespace(**{**vars(args), "dtype": "float32"})
    for order in (1, 2):
        names = {name for o, _, some in cases(args) if o == order for name in some}
        case = Case(exact_args, order, length, "dense")
        with torch.no_grad():
            # The same rounded numbers as the contenders get.
            for x in [*case.inputs, case.do]:
                x.copy_(x.to(getattr(torch, args.dtype)))
        ways = Case(args, order, length, "tiled").ways
        case.ways = [x.float() for x in ways]
        exact = case()
        for name in sorted(names):
            got = Case(args, order, length, name)
            if order == 2:
                got.ways = ways
            error = float((got().float() - exact).norm() / exact.norm())
            found[f"order {order}, {name}"] = error
            # Rounding of the type, some of it in intermediate results.
            assert error < 20 * torch.finfo(got.dtype).eps, (order, name, error)
    return found


def seconds(run: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def timed(
    args: argparse.Namespace, order: int, length: int, names: list[str]
) -> dict[str, dict[str, object]]:
    """Median seconds and the median of the ratio to the first contender, interleaved."""
    rows: dict[str, dict[str, object]] = {}
    running: dict[str, Case] = {}
    for name in names:
        case = Case(args, order, length, name)
        # The first call compiles and warms up; it also tells what does not fit.
        error = attempt(case)
        if error is None:
            running[name] = case
        else:
            rows[name] = {"error": error}
            del case
            torch.cuda.empty_cache()
    measured: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(args.repeats):
        for name, case in running.items():
            measured[name].append(seconds(case, args.device))
    base = measured.get(names[0])
    for name, values in measured.items():
        rows[name] = {"seconds": statistics.median(values), "all_seconds": values}
        if base is not None:
            ratios = [a / b for a, b in zip(values, base, strict=True)]
            rows[name]["ratio"] = statistics.median(ratios)
    return rows


def peak(args: argparse.Namespace, order: int, length: int, name: str) -> int:
    """Peak of the allocator from before inputs and mask; on a CPU the growth of the process."""
    Case(args, order, 64, name)()  # libraries load and compile at the first call
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        Case(args, order, length, name)()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    before = process_memory("VmRSS")
    Case(args, order, length, name)()
    return process_memory("VmHWM") - before


def peak_apart(order: int, length: int, name: str) -> int | str:
    """`peak` in a fresh process, or the last line of its error."""
    where = ["--peak", str(order), str(length), name]
    run = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], *where], capture_output=True, text=True
    )
    if run.returncode:
        return run.stderr.strip().splitlines()[-1]
    return json.loads(run.stdout.splitlines()[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, float32")
    parser.add_argument("--length", type=int, default=32 * 1024)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--kv", type=int, default=4)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", type=int, default=2048, help="length of the comparison")
    parser.add_argument("--output", type=Path, help=f"default on a GPU: {RESULTS}")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        quick = {"length": 1024, "heads": 4, "kv": 2, "size": 32, "repeats": 2, "check": 256}
        vars(args).update(quick, dtype="float32")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --quick shows that the script runs")
    return args


def main() -> None:
    args = parse()
    if args.peak:
        order, length, name = args.peak
        print(json.dumps(peak(args, int(order), int(length), name)))
        return
    wrong = errors(args)
    print("relative errors:", {name: f"{error:.1e}" for name, error in wrong.items()})
    output = args.output or (RESULTS if args.device == "cuda" and not args.quick else None)
    # environment() names a GPU wherever there is one, also where it was not used.
    machine = {**environment(getattr(torch, args.dtype)), "cuda": torch.version.cuda}
    machine["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    rows: list[dict[str, object]] = []
    report = {
        "benchmark": "attention_gpu",
        "environment": machine,
        "shape": {key: vars(args)[key] for key in ("length", "heads", "kv", "size")},
        "repeats": args.repeats,
        "relative_errors": {"length": args.check, **wrong},
        "rows": rows,
    }
    for order, length, names in cases(args):
        times = timed(args, order, length, names)
        # Where memory is counted by process, they do not disturb each other.
        with ThreadPoolExecutor(len(names) if args.device == "cuda" else 1) as pool:
            peaks = pool.map(partial(peak_apart, order, length), names)
        for name, memory in zip(names, peaks, strict=True):
            row = {"order": order, "length": length, "contender": name, **times[name]}
            rows.append({**row, "peak_bytes": memory})
            print(
                f"order {order}, {length:6} tokens, {name:18}",
                f"{row['seconds'] * 1e3:10.1f} ms" if "seconds" in row else row["error"],
                f"x{row['ratio']:.2f}" if "ratio" in row else "",
                f"{memory / 2**20:10.0f} MB" if isinstance(memory, int) else memory,
                flush=True,
            )
        # After each case: a run that is stopped has what it measured.
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
