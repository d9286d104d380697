"""An optimiser that is a small network (arXiv 1606.04474), trained through its own runs on digits.

It is trained through whole runs of 30 steps, and then tried on other digits and another start,
beside Adam at the best of five rates.
"""

import argparse

import torch
from digits import losses, split, starter

import metafocus as mf


def loss(fast, slow, data):
    return losses(fast, data).mean()


def inner(fast, slow, support):
    return loss(fast, slow, support["data"])


PROBLEM = mf.Problem(inner, loss, init=lambda slow, support: support["start"])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--recurrent", action="store_true", help="an LSTM in place of an MLP")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    train, other, new, unseen = split(200, 200, 200, 200, seed=args.seed)
    rule = mf.recipes.LearnedOptimiser(steps=30, recurrent=args.recurrent, hidden=8)
    slow = rule.start(torch.Generator().manual_seed(args.seed))
    slow = {k: v.requires_grad_() for k, v in slow.items()}
    optimiser = torch.optim.Adam(slow.values(), lr=0.03)
    meta = mf.bilevel(PROBLEM, solver=rule, estimator=mf.Unrolled(store=mf.stores.segments()))
    for step in range(10 if args.quick else 100):
        # Another start each time, so that the rule does not learn one run by heart.
        support = {"data": train, "start": starter(hidden=16, seed=step)()}
        value, _ = meta(slow, mf.Episode(support, other))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        if step % 10 == 0:
            print(f"step {step:3}  loss after a run of 30 steps {value.item():.3f}")

    learned = {k: v.detach() for k, v in slow.items()}
    support = {"data": new, "start": starter(hidden=16, seed=10_000)()}

    def after(solver):
        found = mf.adapt(PROBLEM, learned, support, solver=solver)
        return loss(found.params, {}, unseen).item()

    rates = (0.003, 0.01, 0.03, 0.1, 0.3)
    report = {
        "learned optimiser": after(rule),
        "Adam, the best of five rates": min(after(mf.Adam(rate, 30)) for rate in rates),
    }
    for name, value in report.items():
        print(f"{name:30} loss on unseen digits {value:.3f}")
    return report


if __name__ == "__main__":
    main()
