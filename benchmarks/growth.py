"""How the cost of one hypergradient grows, along six axes; resumable.

    python benchmarks/growth.py            # measures what benchmarks/results/growth.json lacks
    python benchmarks/growth.py --report   # writes the figures and the tables of docs/growth.md

Each point is a process of its own, forked from one that has made small calls, on one thread:
seconds of CPU time, and the growth of its peak RSS over the level before the call. The allocator
returns what is freed. A small call of the same meta loss comes first, so that the checks of the
first call do not count. A point that takes more than `--limit` seconds of the clock is written
down as such, and the larger points of its line are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import metafocus as mf
from metafocus.comparison.memory import process_memory
from metafocus.comparison.report import environment

RESULTS = Path(__file__).parent / "results" / "growth.json"
Call = Callable[[int], Callable[[], Any]]


def fit(fast, slow, data):
    x, y = data
    hidden = torch.tanh(torch.tanh(x @ fast["w1"]) @ fast["w2"])
    return ((hidden @ fast["w3"] - y) ** 2).mean()


def weights(width: int) -> dict[str, torch.Tensor]:
    shapes = {"w1": (1, width), "w2": (width, width), "w3": (width, 1)}
    return {k: (torch.randn(s) * s[0] ** -0.5).requires_grad_() for k, s in shapes.items()}


def points(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(*size, 10, 1)
    return x, x.sin()


def meta_of(estimator: Any, steps: int, width: int = 40) -> Any:
    return mf.bilevel(mf.Problem(fit, fit), solver=mf.SGD(0.4 / width, steps), estimator=estimator)


def checked(meta: Any) -> Any:
    """Make the first call, on a few weights: it tries the inner loss once more than the others."""
    data = points()
    meta(weights(2), mf.Episode(data, data))[0].backward()
    return meta


def steps(estimator: Any) -> Call:
    """An MLP 1-24-24-1 of 2.5 kB, one task."""

    def at(count: int) -> Callable[[], Any]:
        outer, data, meta = weights(24), points(), checked(meta_of(estimator, count, 24))
        return lambda: meta(outer, mf.Episode(data, data))[0].backward()

    return at


def tasks(estimator: Any, **options: Any) -> Call:
    """Five steps of an MLP 1-150-150-1, 23 k weights; the caller keeps gradient and aux."""

    def at(count: int) -> Callable[[], Any]:
        outer, data = weights(150), points(count)
        meta = mf.over_tasks(checked(meta_of(estimator, 5, 150)), **options)
        return lambda: mf.hypergrad(meta)(outer, mf.Episode(data, data))

    return at


def parameters(estimator: Any) -> Call:
    """Two steps of an MLP 1-h-h-1, one task."""

    def at(count: int) -> Callable[[], Any]:
        width = round(count**0.5)
        outer, data, meta = weights(width), points(), checked(meta_of(estimator, 2, width))
        return lambda: meta(outer, mf.Episode(data, data))[0].backward()

    return at


def by_hand(count: int) -> Callable[[], Any]:
    """First-order MAML as a loop of torch.autograd.grad."""
    width = round(count**0.5)
    outer, data = weights(width), points()

    def call() -> None:
        fast = outer
        for _ in range(2):
            fast = {k: v.detach().requires_grad_() for k, v in fast.items()}
            grads = torch.autograd.grad(fit(fast, None, data), list(fast.values()))
            with torch.no_grad():
                moves = zip(fast.items(), grads, strict=True)
                fast = {k: torch.add(v, g, alpha=-0.4 / width) for (k, v), g in moves}
        fast = {k: v.requires_grad_() for k, v in fast.items()}
        found = torch.autograd.grad(fit(fast, None, data), list(fast.values()))
        for leaf, grad in zip(outer.values(), found, strict=True):
            leaf.grad = grad

    return call


def batch(rows: int, length: int, turns: int) -> dict[str, torch.Tensor]:
    """Turns of equal length, of which each ends with an answer of a quarter of its tokens."""
    size = length // turns
    index = torch.arange(length)[None].expand(rows, -1)
    answer = index % size >= size - max(size // 4, 1)
    ids = torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "answer_mask": answer,
        "turn_ids": (index // size).clamp(max=turns - 1) * 2 + answer,
    }


def focusft(axis: str, estimator: Any, adapter: Any = None, **options: Any) -> Call:
    """A Qwen2 of 4 layers, hidden 64, K = 2; LoRA of rank 8 on the MLPs of the last layer."""

    def at(count: int) -> Callable[[], Any]:
        import transformers

        config = transformers.Qwen2Config(
            vocab_size=1000,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32768,
            attn_implementation="sdpa",
        )
        model = transformers.Qwen2ForCausalLM(config)
        names = ("gate_proj", "up_proj", "down_proj")
        chosen = adapter or mf.LoRA(mf.top_layers(0.25, names), 8, 16.0)
        meta = mf.recipes.focusft(model, adapter=chosen, estimator=estimator, **options)
        sizes = {"rows": 1, "length": 256 if axis == "rows" else 4096, "turns": 4}
        small, data = (batch(**sizes | more) for more in ({"length": 64}, {axis: count}))
        meta({}, mf.Episode(small, small))
        return lambda: meta({}, mf.Episode(data, data))[0].backward()

    return at


first, graph = mf.FirstOrder(), mf.Unrolled()
rebuilt, auto = mf.Unrolled(recompute=True), mf.Unrolled(recompute="auto")
AXES: dict[str, tuple[list[int], dict[str, Call]]] = {
    "steps": (
        [100, 1000, 10000],
        {
            "FirstOrder()": steps(first),
            "Unrolled()": steps(graph),
            "Unrolled(recompute=True)": steps(rebuilt),
            'Unrolled(recompute="auto")': steps(auto),
            "stores.schedule(12)": steps(mf.Unrolled(store=mf.stores.schedule(12))),
        },
    ),
    "tasks": (
        [100, 1000, 10000],
        {
            'chunk_size="auto", the default': tasks(first),
            'aux="losses"': tasks(first, aux="losses"),
            "chunk_size=None": tasks(first, chunk_size=None),
            'how="loop", aux="losses"': tasks(first, how="loop", aux="losses"),
        },
    ),
    "parameters": (
        [10**5, 10**6, 10**7, 5 * 10**7],
        {
            "by hand, first order": by_hand,
            "FirstOrder()": parameters(first),
            "Unrolled()": parameters(graph),
            "Unrolled(recompute=True)": parameters(rebuilt),
        },
    ),
    "length": (
        [1024, 4096, 16384],
        {
            "FocuSFT, first order": focusft("length", first),
            "plain fine-tuning": focusft("length", first, mf.NoAdapter()),
            "FocuSFT, second order": focusft("length", rebuilt),
        },
    ),
    "turns": (
        [4, 40, 400],
        {
            "FocuSFT, first order": focusft("turns", first),
            "plain fine-tuning": focusft("turns", first, mf.NoAdapter()),
        },
    ),
    "rows": (
        [1, 4, 16],
        {
            "shared fast weights": focusft("rows", first),
            "per_example=True": focusft("rows", first, per_example=True),
        },
    ),
}


SMALL = {"steps": 1, "tasks": 2, "parameters": 100, "length": 64, "turns": 4, "rows": 1}
"""The call that comes before each measurement."""


def measured(axis: str, line: str, count: int) -> dict[str, float]:
    """Measure one point in this process."""
    torch.manual_seed(0)
    lines = AXES[axis][1]
    lines[line](SMALL[axis])()
    call = lines[line](count)
    before = process_memory("VmRSS")
    # The peak of this process begins anew.
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    kept = call()
    row = {"seconds": time.process_time() - start}
    row["peak_bytes"] = process_memory("VmHWM") - before
    del kept
    return row


def fresh(axis: str, line: str, count: int, limit: int) -> dict[str, Any]:
    """Measure one point in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(limit)
        try:
            row: dict[str, Any] = measured(axis, line, count)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"[:200]}
        os.write(writing, json.dumps(row).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    late = number == signal.SIGALRM
    return {"error": f"more than {limit} s" if late else f"ended by signal {number}"}


def returning_freed_memory() -> None:
    """Start this process anew with an allocator that returns what is freed."""
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    if not malloc.items() <= os.environ.items():
        env = {**os.environ, **malloc, "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, "-W", "ignore", *sys.argv], env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=list(AXES))
    parser.add_argument("--limit", type=int, default=300, help="seconds of the clock for a point")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.report:
        from benchmarks.growth_report import write

        write(json.loads(args.output.read_text()))
        return
    # What is imported at a first call is imported once for all points.
    for axis in args.axes:
        next(iter(AXES[axis][1].values()))(SMALL[axis])()
    old = json.loads(args.output.read_text()) if args.output.exists() else {"rows": []}
    report = {"benchmark": "growth", "environment": environment(torch.float32)} | old
    rows = report["rows"]
    known = {(r["axis"], r["line"], r["count"]) for r in rows}
    # Small points first: a run that is stopped has all lines up to some size.
    for place in range(max(len(values) for values, _ in AXES.values())):
        for axis in args.axes:
            values, lines = AXES[axis]
            for line in lines if place < len(values) else ():
                failed = any((r["axis"], r["line"]) == (axis, line) and "error" in r for r in rows)
                count = values[place]
                if failed or (axis, line, count) in known:
                    continue
                row = {"axis": axis, "line": line, "count": count}
                rows.append({**row, **fresh(axis, line, count, args.limit)})
                print(rows[-1], flush=True)
                args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    returning_freed_memory()
    main()
