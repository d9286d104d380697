"""Which training digits helped each test digit (MAGIC, arXiv 2504.16430), and is that true?

The scores are the derivative of each query's loss through the whole training run. The linear
datamodeling score trains anew without some digits and compares with what the scores predict; the
influence function is the usual baseline. The picture shows what helped and what harmed.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from digits import losses, rows, split, starter

import metafocus as mf


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/attribution"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    train, query = split(200 if args.quick else 600, 6, seed=args.seed)
    g = torch.Generator().manual_seed(args.seed)
    steps = 40 if args.quick else 150
    stream = mf.Batches.from_dataset(rows(train), batch_size=50, steps=steps, generator=g)

    found = mf.recipes.attribution(
        losses,
        starter(seed=args.seed),
        stream,
        query,
        solver=mf.SGD(0.1, steps, momentum=0.9, weight_decay=1e-3),
    )
    influence = mf.recipes.influence(losses, found.params, train, query, damping=1e-2)
    report = {}
    for name, scores in (("metagradient", found.scores), ("influence function", influence)):
        score = mf.recipes.linear_datamodeling_score(
            scores,
            found.retrained,
            subsets=20 if args.quick else 50,
            drop=0.05,
            generator=torch.Generator().manual_seed(args.seed),
        )
        report[name] = score.mean
        print(f"{name:20} linear datamodeling score {report[name]:.3f}")

    args.output.mkdir(parents=True, exist_ok=True)
    draw(train, query, found.scores, args.output / "attribution.png")
    print(f"wrote {args.output / 'attribution.png'}")
    return report


def draw(train, query, scores, path):
    """Draw each query beside the four digits that helped and the four that harmed most."""
    figure, axes = plt.subplots(len(query["y"]), 9, figsize=(9, len(query["y"])))
    for row, digit, score in zip(axes, query["x"], scores, strict=True):
        order = score.argsort()
        shown = [digit, *train["x"][order[:4]], *train["x"][order.flip(0)[:4]]]
        for axis, image in zip(row, shown, strict=True):
            axis.imshow(image.reshape(8, 8).numpy(), cmap="gray_r")
            axis.axis("off")
    for column, title in ((0, "query"), (1, "helped most"), (5, "harmed most")):
        axes[0, column].set_title(title, loc="left", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
