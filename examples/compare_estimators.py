"""Which hypergradient suits a problem? `mf.compare` measures it on any pair of losses.

The problem here is a robust regression. Its two hyper-parameters, the width of the Huber loss and
the strength of the penalty, are learned by a validation loss. Replace `inner` and `outer` by yours.
"""

import argparse
from pathlib import Path

import torch

import metafocus as mf


def residual(fast, data):
    x, y = data
    return x @ fast["w"] - y


def inner(fast, slow, data):
    width = slow["log_width"].exp()
    huber = width**2 * ((1 + (residual(fast, data) / width) ** 2).sqrt() - 1)
    return huber.mean() + slow["log_l2"].exp() * (fast["w"] ** 2).sum()


def outer(fast, slow, data):
    return residual(fast, data).abs().mean()


def draw(size, outliers, generator):
    x = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(4 * size, generator=generator, dtype=torch.float64)
    wild = torch.rand(4 * size, generator=generator) < outliers
    return x, x.sum(1) / size**0.5 + torch.where(wild, 10 * noise, 0.1 * noise)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/compare_estimators"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(args.seed)
    size = 20 if args.quick else 200
    data = mf.Episode(draw(size, 0.2, generator), draw(size, 0.0, generator))
    problem = mf.Problem(inner, outer, init=lambda slow, support: {"w": torch.zeros(size).double()})
    slow = {"log_width": torch.tensor(0.0).double(), "log_l2": torch.tensor(-3.0).double()}
    # The reference is the exact gradient at the minimum; each estimator takes a hundred steps.
    solver, long = mf.SGD(0.5, steps=100), mf.SGD(0.5, steps=2000)
    exact = mf.bilevel(problem, solver=long, estimator=mf.Implicit(mf.Dense()))
    exact = mf.hypergrad(exact)(slow, data)[0]
    estimators = {
        "unrolled": mf.Unrolled(),
        "unrolled, recompute": mf.Unrolled(recompute=10),
        "unrolled, last 10": mf.Unrolled(last=10),
        "implicit, CG(3)": mf.Implicit(mf.CG(3)),
        "implicit, CG(20)": mf.Implicit(mf.CG(20)),
        "implicit, Neumann(20)": mf.Implicit(mf.Neumann(20, scale=0.5)),
        "penalty": mf.Penalty(1e4),
        "first order": mf.FirstOrder(),
    }
    plain = mf.bilevel(problem, solver=solver, estimator=mf.FirstOrder())
    evolution = mf.algorithms.Evolution(plain, sigma=0.05, pairs=32, generator=generator)
    others = {"evolution": evolution}
    comparison = mf.compare(
        problem, slow, data, solver=solver, estimators=estimators, reference=exact, others=others
    )
    print(comparison.table())
    args.output.mkdir(parents=True, exist_ok=True)
    comparison.plot(args.output / "compare.png")
    comparison.to_json(args.output / "compare.json")
    good = [row for row in comparison.rows if row["relative_error"] < 0.01]
    for key in ("seconds", "peak_bytes"):
        best = min(good, key=lambda row: row[key])
        print(f"least {key} with an error below 1 %: {best['name']}")
    return {row["name"]: row for row in comparison.rows}


if __name__ == "__main__":
    main()
