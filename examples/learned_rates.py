"""Meta-SGD: learn how far each weight should move, as well as where it starts.

In MAML the inner learning rate is a number that somebody chose. In Meta-SGD (arXiv 1707.09835)
each weight has a rate of its own, which is an outer parameter: the `lr` of a solver may be any
function of the outer parameters. Rates can become negative, and as large as the tasks need.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn import Linear, ReLU, Sequential

import metafocus as mf
from metafocus.recipes import fewshot

net = Sequential(Linear(1, 40), ReLU(), Linear(40, 40), ReLU(), Linear(40, 1))


def loss(params, data):
    return ((torch.func.functional_call(net, params, (data[0],)) - data[1]) ** 2).mean()


METHODS = {
    "MAML": (fewshot.maml(loss), mf.SGD(0.01, steps=1)),
    # with_rates(weights, 0.01) adds outer parameters; learned_rates finds them among the others.
    "Meta-SGD": (fewshot.meta_sgd(loss), mf.SGD(fewshot.learned_rates, steps=1)),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/learned_rates"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    net.apply(lambda layer: layer.reset_parameters() if isinstance(layer, Linear) else None)
    start = {k: v.detach() for k, v in net.named_parameters()}
    unseen = fewshot.sinusoids(500, 10, 100, generator=torch.Generator().manual_seed(2))

    found, rates = {}, {}
    for name, (problem, solver) in METHODS.items():
        meta = mf.over_tasks(mf.bilevel(problem, solver=solver, estimator=mf.Unrolled()))
        outer = fewshot.with_rates(start, 0.01) if name == "Meta-SGD" else start
        outer = {k: v.clone().requires_grad_() for k, v in outer.items()}
        optimizer = torch.optim.Adam(outer.values(), 3e-3)
        tasks = torch.Generator().manual_seed(1)  # the same for both
        for _ in range(1000 if args.quick else 10000):
            optimizer.zero_grad()
            meta(outer, fewshot.sinusoids(25, 10, 10, generator=tasks))[0].backward()
            optimizer.step()
        found[name] = meta(outer, unseen)[0].item()
        rates = fewshot.learned_rates({k: v.detach() for k, v in outer.items()})
        print(f"{name}: error after one step on 500 unseen curves {found[name]:.3f}")

    summary = {}
    for name, rate in rates.items():
        summary[name] = {
            "median": rate.median().item(),
            "largest": rate.max().item(),
            "negative": (rate < 0).float().mean().item(),
        }
        print(f"rates of {name:9}", *(f"{k} {v:+.4f}" for k, v in summary[name].items()), sep="   ")
    better, worse = sorted(found, key=lambda name: found[name])
    print(f"{better} has {found[better] / found[worse]:.2f} times the error of {worse}")
    args.output.mkdir(parents=True, exist_ok=True)
    report = {"errors": found, "rates": summary}
    (args.output / "learned_rates.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
