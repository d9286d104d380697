"""Ten learned images that train a network on digits (data distillation, arXiv 1811.10959).

The images and the rate of each step are learned through hundreds of steps of training on them.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from digits import accuracy, losses, split, starter

import metafocus as mf


def loss(params, data):
    return losses(params, {"x": data[0], "y": data[1]}).mean()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/distill"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    train, test = split(800, 800, seed=args.seed)
    steps = 50 if args.quick else 300
    labels = torch.arange(10)
    meta = mf.recipes.distill(loss, starter(seed=args.seed), labels, steps=steps)

    # One real digit of each class is the start, and the baseline.
    first = torch.stack([train["x"][train["y"] == label][0] for label in labels])
    slow = {
        "x": first.clone().requires_grad_(),
        "log_lr": torch.full((steps,), -2.0, requires_grad=True),
    }
    optimiser = torch.optim.Adam(slow.values(), lr=0.02)
    found = []
    for step in range(20 if args.quick else 150):
        value, aux = meta(slow, mf.Episode(None, (train["x"], train["y"])))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        found.append(accuracy(aux.params, test))
        if step % 10 == 0:
            print(f"step {step:3}  loss {value.item():.3f}  test accuracy {found[-1]:.3f}")
    report = {"ten real digits": found[0], "ten learned images": found[-1]}
    for name, value in report.items():
        print(f"{name:20} test accuracy {value:.3f}")

    args.output.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(2, 10, figsize=(10, 2.2), layout="constrained")
    for row, images in zip(axes, (first, slow["x"].detach()), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.reshape(8, 8).numpy(), cmap="gray_r")
            axis.axis("off")
    figure.savefig(args.output / "distill.png", dpi=120)
    plt.close(figure)
    print(f"wrote {args.output / 'distill.png'}")
    return report


if __name__ == "__main__":
    main()
