"""A start that a network makes from the support, alone and adapted further, beside MAML.

Text-to-LoRA (arXiv 2506.06105) generates the fast weights and takes no step. MAML takes steps from
a constant start. With `mf.recipes.generated` a task can have both. The tasks are sinusoids, and the
fast weights are the last layer of the network.
"""

import argparse

import torch

import metafocus as mf

HIDDEN, SHOTS = 40, 10


def features(slow, x):
    return torch.tanh(torch.tanh(x @ slow["w1"] + slow["b1"]) @ slow["w2"] + slow["b2"])


def loss(fast, slow, data):
    x, y = data
    return ((features(slow, x) @ fast["w"] + fast["b"] - y) ** 2).mean()


def constant(slow, support):
    return {"w": slow["w"], "b": slow["b"]}


def generate(slow, support):
    """Return the last layer for a support set: a mean over its points, then a linear map."""
    x, y = support
    seen = torch.tanh(torch.cat([x, y], -1) @ slow["g1"] + slow["c1"]).mean(-2)
    made = seen @ slow["g2"]
    return {"w": made[:-1, None], "b": made[-1:]}


def tasks(n, generator):
    size = 0.1 + 4.9 * torch.rand(n, 1, 1, generator=generator)
    phase = torch.pi * torch.rand(n, 1, 1, generator=generator)
    x = 10 * torch.rand(n, 2 * SHOTS, 1, generator=generator) - 5
    y = size * torch.sin(x + phase)
    return mf.Episode((x[:, :SHOTS], y[:, :SHOTS]), (x[:, SHOTS:], y[:, SHOTS:]))


def start(generator):
    def drawn(a, b):
        return torch.randn(a, b, generator=generator) / a**0.5

    values = {
        "w1": drawn(1, HIDDEN), "b1": torch.zeros(HIDDEN),
        "w2": drawn(HIDDEN, HIDDEN), "b2": torch.zeros(HIDDEN),
        "w": drawn(HIDDEN, 1), "b": torch.zeros(1),
        "g1": drawn(2, 128), "c1": torch.zeros(128), "g2": 0.1 * drawn(128, HIDDEN + 1),
    }  # fmt: skip
    return {k: v.requires_grad_() for k, v in values.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    problem = mf.Problem(loss, loss, constant)
    none, three = mf.SGD(0.0, steps=0), mf.SGD(0.01, steps=3)
    ways = {
        "constant start, 3 steps (MAML)": (problem, three),
        "generated, no step": (mf.recipes.generated(problem, generate), none),
        "constant + generated, 3 steps": (
            mf.recipes.generated(problem, generate, on_top=True),
            three,
        ),
    }
    report = {}
    for name, (one, solver) in ways.items():
        meta = mf.over_tasks(mf.bilevel(one, solver=solver, estimator=mf.Unrolled()))
        slow = start(torch.Generator().manual_seed(args.seed))
        optimiser = torch.optim.Adam(slow.values(), lr=1e-3)
        generator = torch.Generator().manual_seed(args.seed + 1)
        for _ in range(200 if args.quick else 3000):
            value, _ = meta(slow, tasks(25, generator))
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        with torch.no_grad():
            new = tasks(500, torch.Generator().manual_seed(args.seed + 2))
            report[name] = meta(slow, new)[0].item()
        print(f"{name:32} loss on new tasks {report[name]:.3f}")
    return report


if __name__ == "__main__":
    main()
