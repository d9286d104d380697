"""Gradients through training runs: the time of each store, and how smooth runs are.

The data, the network and the batches are those of `benchmarks/attribution.py`; one thread.

    python benchmarks/training_runs.py --output benchmarks/results/training_runs.json

`stores`: 3,000 steps of SGD on 8 rows, an MLP 3-4-1 in float64; CPU seconds of one hypergradient,
the smaller of two, beside the seconds that the steps taken again predict. `smoothness`: 100 steps,
`h = 0.01` in each weight of an example, two directions, in float64 unless named.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from attribution import QUERY, TRAIN, N
from torch import nn

import metafocus as mf

STEPS, F64 = 100, torch.float64


# --- stores ----------------------------------------------------------------------------------


def mlp(fast, slow, data):
    x, y = data
    out = (torch.tanh(x @ fast["w1"]) @ fast["w2"]).squeeze(-1)
    return (slow["weight"].sigmoid() * (out - y) ** 2).mean()


def store_seconds(steps: int = 3000) -> list[dict]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=g, dtype=F64), torch.randn(8, generator=g, dtype=F64)
    outer = {
        "w1": torch.randn(3, 4, generator=g, dtype=F64) / 2,
        "w2": torch.randn(4, 1, generator=g, dtype=F64) / 2,
        "weight": torch.zeros(8, dtype=F64),
    }
    problem = mf.Problem(mlp, mlp, lambda slow, _: {k: slow[k] for k in ("w1", "w2")})
    solver = mf.SGD(0.02, steps, momentum=0.5)
    episode = mf.Episode((x, y), (x.flip(0), y.flip(0)))

    def timed(run) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    forward = min(timed(lambda: mf.adapt(problem, outer, (x, y), solver=solver)) for _ in range(2))
    rows = []
    for name, store in {
        "device()": mf.stores.device(),
        "segments()": mf.stores.segments(),
        "schedule(12)": mf.stores.schedule(12),
        "tree(4)": mf.stores.tree(4),
    }.items():
        meta = mf.bilevel(problem, solver=solver, estimator=mf.Unrolled(store=store))
        took = min(timed(lambda meta=meta: mf.hypergrad(meta)(outer, episode)) for _ in range(2))
        cost = store.cost(steps)
        base = rows[0]["cpu_seconds"] if rows else took
        predicted = base + forward * cost.extra / steps
        rows.append(
            {
                "store": name,
                "states": cost.states,
                "again": cost.extra,
                "cpu_seconds": round(took, 2),
                "predicted": round(predicted, 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


# --- smoothness ------------------------------------------------------------------------------

RUNS = {
    "tanh, momentum SGD, rate 0.03": (nn.Tanh, mf.SGD(0.03, STEPS, momentum=0.9)),
    "tanh, momentum SGD, rate 0.3": (nn.Tanh, mf.SGD(0.3, STEPS, momentum=0.9)),
    "tanh, momentum SGD, rate 1.0": (nn.Tanh, mf.SGD(1.0, STEPS, momentum=0.9)),
    "GELU, momentum SGD, rate 0.03": (nn.GELU, mf.SGD(0.03, STEPS, momentum=0.9)),
    "ReLU, momentum SGD, rate 0.03": (nn.ReLU, mf.SGD(0.03, STEPS, momentum=0.9)),
    "ReLU, momentum SGD, rate 0.3": (nn.ReLU, mf.SGD(0.3, STEPS, momentum=0.9)),
    "batch norm and tanh, rate 0.03": ("norm", mf.SGD(0.03, STEPS, momentum=0.9)),
    "tanh, Adam 0.003, eps 1e-8": (nn.Tanh, mf.Adam(0.003, STEPS)),
    "tanh, Adam 0.003, eps 1e-3": (nn.Tanh, mf.Adam(0.003, STEPS, eps=1e-3)),
    "tanh, Adam 0.03, eps 1e-8": (nn.Tanh, mf.Adam(0.03, STEPS)),
    "tanh, Muon, rate 0.02": (nn.Tanh, mf.Muon(0.02, STEPS)),
    "tanh, rate 0.03, float32": (nn.Tanh, mf.SGD(0.03, STEPS, momentum=0.9)),
    "tanh, rate 0.03, bfloat16": (nn.Tanh, mf.SGD(0.03, STEPS, momentum=0.9)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def smooth(name: str) -> dict:
    kind, solver = RUNS[name]
    dtype = DTYPES.get(name.split(", ")[-1], F64)
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(32), nn.Tanh()] if kind == "norm" else [kind()]
    net = nn.Sequential(nn.Linear(64, 32), *middle, nn.Linear(32, 10)).to(dtype)
    rows = [{"x": a.to(dtype), "y": b} for a, b in zip(*TRAIN, strict=True)]
    stream = mf.Batches.from_dataset(
        rows, batch_size=60, steps=STEPS, generator=torch.Generator().manual_seed(0)
    )

    def losses(params, batch):
        logits = torch.func.functional_call(net, params, (batch["x"],))
        return F.cross_entropy(logits, batch["y"], reduction="none")

    problem = mf.Problem(
        lambda fast, slow, batch: (slow["weight"][batch["index"]] * losses(fast, batch)).mean(),
        lambda fast, slow, batch: losses(fast, batch).mean(),
        lambda slow, _: {k: v.detach() for k, v in net.named_parameters()},
    )
    report = mf.smoothness(
        problem,
        {"weight": torch.ones(N, dtype=dtype)},
        mf.Episode(stream, {"x": QUERY[0].to(dtype), "y": QUERY[1]}),
        solver=solver,
        directions=2,
        generator=torch.Generator().manual_seed(0),
    )
    row = {
        "run": name,
        "smoothness": round(report.value, 3),
        "error": float(f"{max(p.error for p in report.probes):.1e}"),
        "step": min(p.step for p in report.probes),
        "verdict": report.verdict,
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="training_runs.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {"stores": store_seconds(), "smoothness": [smooth(name) for name in RUNS]}
    Path(args.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
