"""MAML on sinusoids: learn a start from which one gradient step fits a new curve.

Each task is a curve of which ten points are known. A network trained on all curves learns their
mean. MAML (arXiv 1703.03400) trains the *start*: it differentiates the loss after a step.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.nn import Linear, ReLU, Sequential

import metafocus as mf
from metafocus.recipes import fewshot

net = Sequential(Linear(1, 40), ReLU(), Linear(40, 40), ReLU(), Linear(40, 1))


def predict(params, x):
    return torch.func.functional_call(net, params, (x,))


PROBLEM = fewshot.maml(lambda params, data: ((predict(params, data[0]) - data[1]) ** 2).mean())


def train(start, inner_steps, outer_steps):
    """Return a start trained on 25 new tasks a step; without inner steps this is plain training."""
    meta = mf.bilevel(PROBLEM, solver=mf.SGD(0.01, inner_steps), estimator=mf.Unrolled())
    params = {k: v.detach().clone().requires_grad_() for k, v in start.items()}
    optimizer, tasks = torch.optim.Adam(params.values(), 3e-3), torch.Generator().manual_seed(1)
    for _ in range(outer_steps):
        loss, _ = mf.over_tasks(meta)(params, fewshot.sinusoids(25, 10, 10, generator=tasks))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {k: v.detach() for k, v in params.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/maml_sinusoid"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)

    # Train two starts on the same tasks: one for the loss after a step, one for the loss itself.
    net.apply(lambda layer: layer.reset_parameters() if isinstance(layer, Linear) else None)
    start, losses, outer_steps = dict(net.named_parameters()), {}, 1000 if args.quick else 10000
    starts = {"MAML": train(start, 1, outer_steps), "plain training": train(start, 0, outer_steps)}

    # Adapt both to 200 new curves.
    unseen = fewshot.sinusoids(200, 10, 100, generator=torch.Generator().manual_seed(2))
    for name, params in starts.items():
        for k in (0, 1, 10):
            meta = mf.bilevel(PROBLEM, solver=mf.SGD(0.01, k), estimator=mf.FirstOrder())
            with torch.no_grad():
                losses[name, k] = mf.over_tasks(meta)(params, unseen)[0].item()
        print(f"{name:15}", *(f"{k} steps: {losses[name, k]:.3f}" for k in (0, 1, 10)), sep="   ")

    # Draw one of the curves, before and after.
    (x, y), (xq, yq) = ((part[0][0], part[1][0]) for part in unseen)
    order, figure = xq.flatten().argsort(), Figure(figsize=(10, 4), layout="constrained")
    for i, (name, params) in enumerate(starts.items(), 1):
        axis = figure.add_subplot(1, 2, i, title=name, ylim=(-5, 5))
        axis.plot(xq[order], yq[order], "k", lw=1, label="the curve")
        axis.plot(x, y, "k^", label="the ten points")
        for k, style in ((0, ":"), (1, "--"), (10, "-")):
            fast = mf.adapt(PROBLEM, params, (x, y), solver=mf.SGD(0.01, k)).params
            axis.plot(xq[order], predict(fast, xq)[order].detach(), style, label=f"{k} steps")
        axis.legend(fontsize=8)
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "maml_sinusoid.png", dpi=150)
    print(f"plain / MAML after 1 step: {losses['plain training', 1] / losses['MAML', 1]:.1f}")
    return losses


if __name__ == "__main__":
    main()
