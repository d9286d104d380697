"""The compiled hypergradient against the same one, eager: first and second order, implicit.

    python benchmarks/compiled.py --output benchmarks/results/compiled.json

MAML on sinusoids (25 tasks, MLP 1-40-40-1, K = 5) and on images (4 tasks of 5 classes, two
convolutions of 16 channels, K = 3), float32, one thread. First the gradients are compared, then
repetitions interleave. Times are of the CPU; the seconds of the first call, which traces and
compiles, are of the clock, since the compiler runs in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

import metafocus as mf
from metafocus.comparison.report import environment

ESTIMATORS = {
    "FirstOrder()": mf.FirstOrder(),
    "Unrolled()": mf.Unrolled(),
    "Unrolled(recompute=True)": mf.Unrolled(recompute=True),
    "Unrolled(hvp=hvp_forward)": mf.Unrolled(hvp=mf.hvp_forward),
    "Implicit(CG(5))": mf.Implicit(mf.CG(5)),
}


def mlp(p, x):
    x = torch.relu(x @ p["w1"] + p["b1"])
    return torch.relu(x @ p["w2"] + p["b2"]) @ p["w3"] + p["b3"]


def sinusoid():
    shapes = {"w1": (1, 40), "b1": (40,), "w2": (40, 40), "b2": (40,), "w3": (40, 1), "b3": (1,)}
    outer = {k: torch.randn(s) * s[0] ** -0.5 * (len(s) > 1) for k, s in shapes.items()}
    amplitude, phase = 0.1 + 4.9 * torch.rand(25, 1, 1), 3.14 * torch.rand(25, 1, 1)
    x = 10 * torch.rand(25, 20, 1) - 5
    y = amplitude * torch.sin(x - phase)

    def loss(fast, slow, batch):
        x, y = batch
        return ((mlp(fast, x) - y) ** 2).mean()

    episodes = mf.Episode((x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:]))
    return loss, outer, episodes, mf.SGD(0.01, 5)


def images():
    shapes = {"c1": (16, 1, 3, 3), "a1": (16,), "c2": (16, 16, 3, 3), "a2": (16,)}
    outer = {k: torch.randn(s) * 0.2 * (len(s) > 1) for k, s in shapes.items()}
    outer |= {"w": torch.randn(16 * 49, 5) * 0.02, "b": torch.zeros(5)}

    def net(p, x):
        x = F.avg_pool2d(torch.relu(F.conv2d(x, p["c1"], p["a1"], padding=1)), 2)
        x = F.avg_pool2d(torch.relu(F.conv2d(x, p["c2"], p["a2"], padding=1)), 2)
        return x.flatten(1) @ p["w"] + p["b"]

    def loss(fast, slow, batch):
        x, y = batch
        return F.cross_entropy(net(fast, x), y)

    x, y = torch.randn(4, 30, 1, 28, 28), torch.arange(5).repeat(4, 6)
    episodes = mf.Episode((x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:]))
    return loss, outer, episodes, mf.SGD(0.1, 3)


WORKLOADS = {"sinusoids": sinusoid, "images": images}


def measured(name: str, estimator: str, backend: str, repeats: int) -> dict:
    torch.manual_seed(0)
    loss, outer, episodes, solver = WORKLOADS[name]()
    # Strong enough for a positive Hessian: else float32 itself, eager too, is a few per cent off.
    inner = mf.proximal(loss, 10.0) if "Implicit" in estimator else loss
    problem = mf.Problem(inner, loss, init=lambda slow, support: dict(slow))
    meta = mf.bilevel(problem, solver=solver, estimator=ESTIMATORS[estimator])
    eager = mf.hypergrad(mf.over_tasks(meta))
    fast = mf.compiled(eager, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mf.errors.NotStationaryWarning)
        want = eager(outer, episodes)[0]
        start = time.perf_counter()
        got = fast(outer, episodes)[0]
        first = time.perf_counter() - start
        runs = {"eager": eager, "compiled": fast}
        seconds: dict[str, list[float]] = {k: [] for k in runs}
        for repetition in range(repeats + 1):
            for which in random.Random(repetition).sample(list(runs), 2):
                start = time.process_time()
                runs[which](outer, episodes)
                if repetition:
                    seconds[which].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(seconds["eager"], seconds["compiled"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    difference = sum(float((got[k] - v).square().sum()) for k, v in want.items()) ** 0.5
    size = sum(float(v.square().sum()) for v in want.values()) ** 0.5
    return {
        "workload": name,
        "estimator": estimator,
        "error": difference / size,
        "first_call_seconds": first,
        "eager_seconds": statistics.median(seconds["eager"]),
        "compiled_seconds": statistics.median(seconds["compiled"]),
        "speedup": middle,
        "speedup_quartiles": [low, high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        # The seconds of a first call are those without the compiler's cache of earlier runs.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in args.workloads:
            for estimator in ESTIMATORS:
                row = measured(name, estimator, args.backend, args.repeats)
                rows.append(row)
                print(row, flush=True)
                if not row["error"] <= 1e-3:
                    raise AssertionError(f"{name}, {estimator}: error {row['error']:.1e}")
                if args.output:
                    report = {
                        "benchmark": "compiled",
                        "environment": environment(torch.float32),
                        "backend": args.backend,
                        "repeats": args.repeats,
                        "rows": rows,
                    }
                    args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
