"""Which training examples helped an answer? The exact derivative of a whole training run (MAGIC).

A network learns to classify points of two moons; some labels are wrong. For a question, the
derivative of its loss by the weight of each training example says which examples helped and which
harmed. The check: leave the most harmful ones out, train again, and look at the loss.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import metafocus as mf

net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
START = {k: v.detach().clone() for k, v in net.named_parameters()}


def losses(params, batch):
    """Return the loss of each example."""
    logits = torch.func.functional_call(net, params, (batch["x"],))
    return torch.nn.functional.cross_entropy(logits, batch["y"], reduction="none")


def moons(count, generator):
    angle = torch.rand(count, generator=generator) * torch.pi
    y = torch.randint(2, (count,), generator=generator)
    x = torch.stack((angle.cos() + y, (angle.sin() - 0.25) * (1 - 2 * y)), 1)
    return x + 0.1 * torch.randn(count, 2, generator=generator), y


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/attribution"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(args.seed)
    count, steps = (60, 150) if args.quick else (400, 1000)
    x, y = moons(count, generator)
    wrong = torch.arange(count) < count // 8
    shown = torch.where(wrong, 1 - y, y)

    # The training run: shuffled batches of rows that keep their numbers, and an inner optimiser.
    rows = [{"x": a, "y": b} for a, b in zip(x, shown, strict=True)]
    train = mf.Batches.from_dataset(rows, batch_size=20, steps=steps, generator=generator)
    points, labels = moons(40, generator)
    questions = {"x": points, "y": labels}
    solver = mf.SGD(0.3, steps)
    found = mf.recipes.attribution(losses, lambda: START, train, questions, solver=solver)
    scores = found.scores.mean(0)  # positive: more weight on this example raises the loss

    # The most harmful examples, and what the same run gives without them.
    harmful = scores.argsort(descending=True)[: count // 8]
    caught = wrong[harmful].float().mean().item()
    kept = torch.ones(2, count)
    kept[1, harmful] = 0
    before, after = found.retrained(kept).mean(1).tolist()
    print(
        f"{caught:.0%} of the {len(harmful)} most harmful examples have a wrong label (12 % would)"
    )
    print(f"loss on the questions: {before:.3f} with all examples, {after:.3f} without these")

    # A picture: harm in colour, wrong labels ringed.
    args.output.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(5, 3.4))
    size = float(scores.abs().max())
    dots = axes.scatter(*x.T, c=scores, cmap="coolwarm", vmin=-size, vmax=size)
    axes.scatter(*x[wrong].T, s=90, facecolors="none", edgecolors="black", label="wrong label")
    axes.legend()
    figure.colorbar(dots, label="derivative of the loss")
    figure.tight_layout()
    figure.savefig(args.output / "attribution.png", dpi=120)
    plt.close(figure)
    return {"caught": caught, "before": before, "after": after}


if __name__ == "__main__":
    main()
