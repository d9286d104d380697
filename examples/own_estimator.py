"""Write an estimator of your own: an unbiased truncation of back-propagation, in ten lines.

An estimator is any function `(inner_loss, solver, start, outer, support) -> mf.Solution`. It
returns the adapted fast weights, and their dependence on `outer` *is* the hypergradient. So
estimators can be added: with `D_k` that of `mf.Unrolled(last=k)`, the telescope
`D_0 + (D_1 - D_0) + ... ` is exact, and one of its differences, drawn at random and divided by its
probability, is exact on average (randomised telescopes, arXiv 1905.07006). All `D_k` have the same
values, so the loss is exact.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

import metafocus as mf


@dataclass(frozen=True)
class Telescope:
    """Differentiate a random number of the last steps, without bias."""

    decay: float = 0.7

    def __call__(self, inner_loss, solver, start, outer, support):
        chance = self.decay ** torch.arange(1, solver.steps + 1.0)
        chance = chance / chance.sum()
        k = int(torch.multinomial(chance, 1)) + 1
        first, less, more = (
            mf.Unrolled(last=n)(inner_loss, solver, start, outer, support) for n in (0, k - 1, k)
        )
        share = 1 / chance[k - 1].item()
        fast = {
            n: first.params[n] + share * (more.params[n] - less.params[n]) for n in first.params
        }
        return mf.Solution(fast, first.losses)


def loss(fast, slow, data):
    x, y = data
    return ((torch.tanh(x @ fast["w1"]) @ fast["w2"] - y) ** 2).mean()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/own_estimator"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    outer = {"w1": torch.randn(4, 8), "w2": torch.randn(8)}
    episode = mf.Episode(*((torch.randn(16, 4), torch.randn(16)) for _ in range(2)))
    problem, solver = mf.Problem(loss, loss), mf.SGD(0.1, steps=12)

    # It stands where the built-in ones stand, and is judged beside them over many draws.
    estimators = {"exact": mf.Unrolled(), "last 3 steps": mf.Unrolled(last=3)}
    estimators = {**estimators, "first order": mf.FirstOrder(), "telescope": Telescope()}
    comparison = mf.compare(
        problem, outer, episode, solver=solver, estimators=estimators, reference="exact", seeds=20
    )
    print(comparison.table())
    args.output.mkdir(parents=True, exist_ok=True)
    comparison.to_json(args.output / "own_estimator.json")

    # Biased estimates stay wrong when they are averaged; an unbiased one does not.
    means = {}
    for name, estimator in estimators.items():
        gradient = mf.hypergrad(mf.bilevel(problem, solver=solver, estimator=estimator))
        draws = [gradient(outer, episode)[0]["w1"] for _ in range(300 if args.quick else 5000)]
        means[name] = torch.stack(draws).mean(0)
    exact = means["exact"]
    errors = {name: ((mean - exact).norm() / exact.norm()).item() for name, mean in means.items()}
    for name, error in errors.items():
        print(f"{name:12}   relative error of the mean of {len(draws)} draws: {error:.3f}")
    return {row["name"]: row["verdict"] for row in comparison.rows}, errors


if __name__ == "__main__":
    main()
