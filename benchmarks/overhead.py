"""What a hypergradient costs beyond the same arithmetic written by hand in torch.

    python benchmarks/overhead.py --output benchmarks/results/overhead.json

MAML on one sinusoid: an MLP 1-h-h-1 with tanh, 10 support and 10 query points, K inner steps of
SGD, first and second order, float32, one thread. By hand it is the shortest loop of
`torch.autograd.grad`, with no check of any kind. The gradients are compared first. Then repetitions
interleave in random order, each of many calls, and the ratio is taken within a repetition. Times
are of the CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

import metafocus as mf
from metafocus.comparison.report import environment

RATE = 0.4  # over the width, so that no inner loop diverges
CASES = [(width, steps, order) for width in (40, 1000) for steps in (1, 5) for order in (1, 2)]
CASES += [(7000, 1, 1)]


def net(w, x):
    x = torch.tanh(x @ w["w1"] + w["b1"])
    return torch.tanh(x @ w["w2"] + w["b2"]) @ w["w3"] + w["b3"]


def loss(fast, slow, data):
    x, y = data
    return ((net(fast, x) - y) ** 2).mean()


def contenders(width: int, steps: int, order: int) -> dict:
    torch.manual_seed(0)
    rate = RATE / width
    shapes = {"w1": (1, width), "b1": (width,), "w2": (width, width), "b2": (width,)}
    shapes |= {"w3": (width, 1), "b3": (1,)}
    outer = {k: torch.randn(s) * s[0] ** -0.5 for k, s in shapes.items()}
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    x = 10 * torch.rand(20, 1) - 5
    episode = mf.Episode((x[:10], x[:10].sin()), (x[10:], x[10:].sin()))
    estimator = mf.Unrolled() if order == 2 else mf.FirstOrder()
    meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(rate, steps), estimator=estimator)
    hypergrad = mf.hypergrad(meta)

    def second() -> list:
        fast = leaves
        for _ in range(steps):
            value = loss(fast, None, episode.support)
            grads = torch.autograd.grad(value, list(fast.values()), create_graph=True)
            fast = {k: v - rate * g for (k, v), g in zip(fast.items(), grads, strict=True)}
        return list(torch.autograd.grad(loss(fast, None, episode.query), list(leaves.values())))

    def first() -> list:
        fast = outer
        for _ in range(steps):
            fast = {k: v.detach().requires_grad_() for k, v in fast.items()}
            value = loss(fast, None, episode.support)
            grads = torch.autograd.grad(value, list(fast.values()))
            with torch.no_grad():
                fast = {k: v - rate * g for (k, v), g in zip(fast.items(), grads, strict=True)}
        fast = {k: v.requires_grad_() for k, v in fast.items()}
        return list(torch.autograd.grad(loss(fast, None, episode.query), list(fast.values())))

    def backward() -> list:
        for v in leaves.values():
            v.grad = None
        meta(leaves, episode)[0].backward()
        return [v.grad for v in leaves.values()]

    return {
        "by hand": second if order == 2 else first,
        "backward": backward,
        "hypergrad": lambda: list(hypergrad(outer, episode)[0].values()),
    }


def measured(width: int, steps: int, order: int, repeats: int) -> dict:
    runs = contenders(width, steps, order)
    want = runs["by hand"]()
    for name, run in runs.items():
        for a, b in zip(run(), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    start = time.process_time()
    runs["by hand"]()
    calls = max(1, min(100, int(0.1 / (time.process_time() - start))))
    seconds: dict[str, list[float]] = {k: [] for k in runs}
    for repetition in range(repeats + 1):
        for name in random.Random(repetition).sample(list(runs), len(runs)):
            start = time.process_time()
            for _ in range(calls):
                runs[name]()
            if repetition:
                seconds[name].append((time.process_time() - start) / calls)
    row = {"parameters": width * (width + 4) + 1, "steps": steps, "order": order, "calls": calls}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["by hand"], strict=True)]
        row[name] = {
            "seconds": statistics.median(times),
            "ratio": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4)[::2],
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--widths", type=int, nargs="*", default=[])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for width, steps, order in CASES:
        if args.widths and width not in args.widths:
            continue
        row = measured(width, steps, order, min(args.repeats, 10) if width > 5000 else args.repeats)
        rows.append(row)
        print(f"h={width} K={steps} order {order}", end="")
        for name in ("by hand", "backward", "hypergrad"):
            one = row[name]
            low, high = one["quartiles"]
            print(f"  {name} {1e3 * one['seconds']:.3f} ms {one['ratio']:.2f}", end="")
            print(f" ({low:.2f}-{high:.2f})", end="")
        print(flush=True)
        if args.output:
            report = {"benchmark": "overhead", "environment": environment(torch.float32)}
            report |= {"repeats": args.repeats, "rows": rows}
            args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
