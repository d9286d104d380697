"""Find wrong labels: learn how much each training sample counts, from a few clean ones.

A third of the labels is wrong, and it is not known which. Each sample has a weight, which is an
outer parameter. The inner loop trains with these weights, and the outer loss measures the result
on a small clean set. So samples with a wrong label lose their weight (arXiv 1803.09050).
"""

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import metafocus as mf
from metafocus.recipes import hpo


def losses(weights, data):
    x, y = data
    return torch.nn.functional.cross_entropy(x @ weights["w"] + weights["b"], y, reduction="none")


def start():
    return {"w": torch.zeros(64, 10), "b": torch.zeros(10)}


def accuracy(weights, data):
    x, y = data
    return ((x @ weights["w"] + weights["b"]).argmax(1) == y).float().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/reweighting"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(args.seed)
    x, y = (torch.tensor(v) for v in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=generator)
    parts = [((x[i] / 16).float(), y[i]) for i in order.split([500, 200, len(x) - 700])]
    (x, true), clean, test = parts
    flipped = torch.rand(len(x), generator=generator) < 1 / 3
    shift = torch.randint(1, 10, true.shape, generator=generator)  # never 0: always another label
    noisy = (x, torch.where(flipped, (true + shift) % 10, true))

    problem = hpo.reweight(losses, start, l2=1e-3)
    solver = mf.SGD(0.5, steps=50, momentum=0.9)
    # The inner loop stops early, so it is unrolled; recompute keeps the memory small.
    meta = mf.bilevel(problem, solver=solver, estimator=mf.Unrolled(last=20, recompute=10))
    episode = mf.Episode((torch.arange(len(x)), noisy), clean)
    outer = {"weight": torch.zeros(len(x), requires_grad=True)}  # logits: all count one half
    optimizer = torch.optim.Adam(outer.values(), 0.3)
    before = meta(outer, episode)[1].params
    for _ in range(40 if args.quick else 200):
        optimizer.zero_grad()
        meta(outer, episode)[0].backward()
        optimizer.step()
    after, weight = meta(outer, episode)[1].params, outer["weight"].detach().sigmoid()
    # An upper bound: a weight of about 0 or 1/2 from the true labels.
    oracle = mf.adapt(problem, {"weight": -20.0 * flipped}, episode.support, solver=solver).params
    report = {
        "area under the ROC curve": roc_auc_score(flipped, -weight),
        "median weight, right label": weight[~flipped].median().item(),
        "median weight, wrong label": weight[flipped].median().item(),
        "test accuracy, all the same": accuracy(before, test),
        "test accuracy, learned weights": accuracy(after, test),
        "test accuracy, wrong ones left out": accuracy(oracle, test),
    }
    for name, value in report.items():
        print(f"{name:36} {value:.3f}")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "reweighting.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
