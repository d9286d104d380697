"""Measures what docs/choosing.md shows: `python docs/figures/tradeoffs.py`, about a minute.

Two problems under many estimators by `mf.compare`, written to `tradeoffs.json`, and the tables of
the page from it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import metafocus as mf

HERE = Path(__file__).parent
STEPS, CONVERGED = 20, 500


def learned_start() -> mf.Comparison:
    """MAML: a start for 20 steps of SGD on a sine, network 1-64-64-1."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, 64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, 1),
    )

    def loss(fast, slow, data):
        x, y = data
        return ((torch.func.functional_call(net, fast, (x,)) - y) ** 2).mean()

    x = torch.empty(2, 256, 1).uniform_(-5, 5)
    problem = mf.Problem(loss, loss)
    solver = mf.SGD(0.05, steps=STEPS)
    pulled = mf.bilevel(problem, solver=solver, estimator=mf.FirstOrder())
    noise = torch.Generator().manual_seed(0)
    return mf.compare(
        problem,
        dict(net.named_parameters()),
        mf.Episode((x[0], x[0].sin()), (x[1], x[1].sin())),
        solver=solver,
        estimators={
            "Unrolled()": mf.Unrolled(),
            "Unrolled(recompute=True)": mf.Unrolled(recompute=True),
            "Unrolled(recompute=5)": mf.Unrolled(recompute=5),
            "Unrolled(hvp=hvp_forward)": mf.Unrolled(hvp=mf.hvp_forward),
            "Unrolled(last=5)": mf.Unrolled(last=5),
            "FirstOrder()": mf.FirstOrder(),
        },
        others={
            "Evolution(pairs=50)": mf.algorithms.Evolution(
                pulled, sigma=0.01, pairs=50, generator=noise
            )
        },
        reference="Unrolled()",
        repeats=9,
        seeds=3,
    )


def hyper_parameters() -> mf.Comparison:
    """A penalty for each of 40 weights of a linear model, trained until it has converged."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 80, 40, generator=generator)
    w = torch.randn(40, generator=generator) * (torch.arange(40) < 10)
    y = x @ w + torch.randn(2, 80, generator=generator)

    def validate(fast, slow, data):
        return ((data[0] @ fast["w"] - data[1]) ** 2).mean()

    def train(fast, slow, data):
        return validate(fast, slow, data) + (slow["log_l2"].exp() * fast["w"] ** 2).sum()

    return mf.compare(
        mf.Problem(train, validate, init=lambda slow, support: {"w": torch.zeros(40)}),
        {"log_l2": torch.full((40,), -2.0)},
        mf.Episode((x[0], y[0]), (x[1], y[1])),
        solver=mf.SGD(0.15, steps=CONVERGED),
        estimators={
            "Implicit(CG(20))": mf.Implicit(mf.CG(20)),
            "Implicit(CG(5))": mf.Implicit(mf.CG(5)),
            "Implicit(Neumann(20))": mf.Implicit(mf.Neumann(20, scale=0.15)),
            "Implicit(Nystrom(20))": mf.Implicit(mf.Nystrom(20, damping=0.3)),
            "Implicit(Identity())": mf.Implicit(mf.Identity(0.5)),
            "Penalty(1000)": mf.Penalty(1000.0),
            "Unrolled()": mf.Unrolled(),
            "Unrolled(recompute=True)": mf.Unrolled(recompute=True),
            "Unrolled(last=20)": mf.Unrolled(last=20),
        },
        reference=mf.Implicit(mf.Dense()),
        repeats=9,
    )


def measure() -> dict:
    """Return what the JSON file holds."""
    titles = (
        (f"A learned start, {STEPS} steps", learned_start),
        (f"Hyper-parameters, {CONVERGED} steps: converged", hyper_parameters),
    )
    problems = []
    for title, run in titles:
        found = run()
        print(found.table())
        problems.append(
            {
                "name": run.__name__,
                "title": title,
                "draw": True,
                "what": (run.__doc__ or "").strip(),
                "reference": found.reference,
                "environment": found.environment,
                "rows": found.rows,
            }
        )
    return {"command": "python docs/figures/tradeoffs.py", "problems": problems}


def main() -> None:
    """Measure and write."""
    (HERE / "tradeoffs.json").write_text(json.dumps(measure(), indent=1) + "\n")


if __name__ == "__main__":
    main()
