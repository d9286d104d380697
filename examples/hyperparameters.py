"""Hyper-parameters by gradient: learned L2 penalties on scikit-learn's digits, against a grid.

The inner problem is a logistic regression, fitted by L-BFGS: the implicit gradient depends on the
minimum only (`mf.Given`). The gradient by 64 penalties costs about as much as the gradient by one.
"""

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import metafocus as mf
from metafocus.recipes import hpo


def loss(weights, data):
    x, y = data
    return torch.nn.functional.cross_entropy(x @ weights["w"] + weights["b"], y)


def start():
    return {"w": torch.zeros(64, 10).double(), "b": torch.zeros(10).double()}


PROBLEM = hpo.log_l2(loss, start)  # inner loss: + exp(log_l2.w) / 2 * w^2, for each entry


def fit(slow, data):
    """Return the minimum of the inner loss."""
    fast = {k: v.requires_grad_() for k, v in start().items()}
    optimizer = torch.optim.LBFGS(fast.values(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = PROBLEM.inner_loss(fast, slow, data)
        value.backward()
        return value

    optimizer.step(closure)
    return fast


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/hyperparameters"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    x, y = (torch.tensor(v) for v in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed))
    train, validation, test = ((x[i] / 16, y[i]) for i in order.split([100, 400, len(x) - 500]))
    meta = mf.bilevel(PROBLEM, solver=mf.Given(fit), estimator=mf.Implicit(mf.CG(20)))

    found, steps = {}, 30 if args.quick else 100
    with torch.no_grad():
        values = [{"log_l2.w": v} for v in torch.linspace(-12, 0, 13 if args.quick else 49)]
        grid = [meta(v, mf.Episode(train, validation)) for v in values]
    found["grid, one penalty"] = (*min(grid, key=lambda pair: pair[0].item()), len(grid))
    for name, shape in (("learned, one penalty", ()), ("learned, one for each pixel", (64, 1))):
        outer = {"log_l2.w": torch.full(shape, -4.0).double().requires_grad_()}
        optimizer = torch.optim.Adam(outer.values(), 0.3, betas=(0.5, 0.9))
        for _ in range(steps):
            optimizer.zero_grad()
            meta(outer, mf.Episode(train, validation))[0].backward()
            optimizer.step()
        found[name] = (*meta(outer, mf.Episode(train, validation)), steps)
    report = {}
    for name, (value, aux, fits) in found.items():
        tested = loss(aux.params, test).item()
        report[name] = {"validation": value.item(), "test": tested, "fits": fits}
        print(f"{name:28} {fits:3} fits   loss: validation {value:.4f}, test {tested:.4f}")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "hyperparameters.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
