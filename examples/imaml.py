"""iMAML: the meta-gradient from the end of adaptation alone, however long the adaptation was.

With a pull back to the start (`mf.proximal`), adaptation has one solution. The implicit function
theorem says how this solution moves with the start, whatever the path to it (arXiv 1909.04630).
Nothing of the inner loop is kept, so memory does not grow with its steps. In return, the loop must
come close to the solution, and a linear system has to be solved, here by conjugate gradients.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import Linear, Sequential, Tanh

import metafocus as mf
from metafocus.recipes import fewshot

net = Sequential(Linear(1, 32), Tanh(), Linear(32, 32), Tanh(), Linear(32, 1))


def loss(params, data):
    return ((torch.func.functional_call(net, params, (data[0],)) - data[1]) ** 2).mean()


PROBLEM = fewshot.imaml(loss, strength=2.0)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/imaml"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    net.apply(lambda layer: layer.reset_parameters() if isinstance(layer, Linear) else None)
    start = {k: v.detach() for k, v in net.named_parameters()}
    generator = torch.Generator().manual_seed(args.seed)

    # How good is one gradient, and what does it cost? The reference unrolls a long loop.
    one = fewshot.sinusoids(1, 10, 10, generator=generator)
    episode = mf.Episode(*((x[0], y[0]) for x, y in one))
    long = mf.bilevel(PROBLEM, solver=mf.SGD(0.05, 500), estimator=mf.Unrolled())
    exact = mf.hypergrad(long)(start, episode)[0]
    estimators = {f"implicit, CG({k})": mf.Implicit(mf.CG(k)) for k in (1, 5, 20)}
    estimators = {"unrolled": mf.Unrolled(), **estimators}
    args.output.mkdir(parents=True, exist_ok=True)
    rows = {}
    for steps in (10, 40, 160):
        solver = mf.SGD(0.05, steps)
        comparison = mf.compare(
            PROBLEM, start, episode, solver=solver, estimators=estimators, reference=exact
        )
        comparison.to_json(args.output / f"{steps}_steps.json")
        for row in comparison.rows:
            rows[row["name"], steps] = row
            cost = f"error {row['relative_error']:.1e}   peak {row['peak_bytes'] / 2**20:.2f} MB"
            print(f"{steps:3} steps   {row['name']:16}   {cost}   {row['verdict']}")
    for name in estimators:
        growth = rows[name, 160]["peak_bytes"] / rows[name, 10]["peak_bytes"]
        print(f"{name}: from 10 to 160 steps its memory grows {growth:.1f} times")

    # Does a start that was learned with it adapt well?
    meta = mf.bilevel(PROBLEM, solver=mf.SGD(0.02, 16), estimator=mf.Implicit(mf.CG(5)))
    meta, unseen = mf.over_tasks(meta), fewshot.sinusoids(200, 10, 50, generator=generator)
    outer = {k: v.clone().requires_grad_() for k, v in start.items()}
    optimizer = torch.optim.Adam(outer.values(), 3e-3)
    for _ in range(200 if args.quick else 5000):
        optimizer.zero_grad()
        meta(outer, fewshot.sinusoids(25, 10, 10, generator=generator))[0].backward()
        optimizer.step()
    with torch.no_grad():
        both = {"random": start, "learned": outer}
        learned = {name: meta(p, unseen)[0].item() for name, p in both.items()}
    print(f"error on unseen curves after 16 steps: {learned}")
    return {"rows": rows, "learned": learned}


if __name__ == "__main__":
    main()
