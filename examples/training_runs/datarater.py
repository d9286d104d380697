"""Learn which training digits have wrong labels (DataRater, arXiv 2505.17895).

Four of ten labels are wrong. Each digit has a free rating, which is learned through whole training
runs from 200 digits with right labels. Then a network is trained on the ratings.
"""

import argparse

import torch
from digits import accuracy, losses, rows, split, starter

import metafocus as mf


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    train, held_out, test = split(400, 200, 800, seed=args.seed)
    g = torch.Generator().manual_seed(args.seed)
    wrong = torch.rand(400, generator=g) < 0.4
    shift = torch.randint(1, 10, (400,), generator=g)
    train["y"] = torch.where(wrong, (train["y"] + shift) % 10, train["y"])

    steps = 60
    stream = mf.Batches.from_dataset(rows(train), batch_size=40, steps=steps, generator=g)
    problem = mf.recipes.datarater(
        losses, starter(seed=args.seed), lambda slow, batch: slow["rating"][batch["index"]]
    )
    solver = mf.SGD(0.3, steps)
    meta = mf.bilevel(problem, solver=solver, estimator=mf.Unrolled(store=mf.stores.segments()))

    slow = {"rating": torch.zeros(400, requires_grad=True)}
    optimiser = torch.optim.Adam(slow.values(), lr=0.1)
    found = []
    for step in range(15 if args.quick else 60):
        loss, aux = meta(slow, mf.Episode(stream, held_out))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(accuracy(aux.params, test))
        if step % 5 == 0:
            print(f"step {step:3}  held-out loss {loss.item():.3f}  test accuracy {found[-1]:.3f}")
    rating = slow["rating"].detach()
    report = {
        "accuracy before": found[0],
        "accuracy after": found[-1],
        # The chance that a right label is rated above a wrong one.
        "wrong labels found": (rating[~wrong, None] > rating[None, wrong]).double().mean().item(),
    }
    for name, value in report.items():
        print(f"{name:20} {value:.3f}")
    return report


if __name__ == "__main__":
    main()
