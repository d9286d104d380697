"""The multi-step loss of MAML++: judge the fast weights after every inner step, not only the last.

MAML's gradient has to find its way back through all inner steps, which is unstable. MAML++
(arXiv 1810.09502) asks for the outer loss after each step and weighs the answers: `path=`. Here the
weights are outer parameters themselves; a list of numbers, annealed by hand, does as well.
"""

from __future__ import annotations

import torch

import metafocus as mf
from metafocus.recipes import fewshot

STEPS = 5


def loss(fast, slow, data):
    x, y = data
    return ((torch.tanh(x @ fast["w1"] + fast["b1"]) @ fast["w2"] - y) ** 2).mean()


def start(slow, support):
    return {k: slow[k] for k in ("w1", "b1", "w2")}


def importance(slow):
    return torch.softmax(slow["importance"], 0)


problem = mf.Problem(loss, loss, start)
meta = mf.bilevel(problem, solver=mf.SGD(0.05, STEPS), estimator=mf.Unrolled(), path=importance)


def main() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    outer = {"w1": randn(1, 30), "b1": randn(30), "w2": 0.2 * randn(30, 1)}
    outer = {k: v.requires_grad_() for k, v in outer.items()}
    outer["importance"] = torch.zeros(STEPS, requires_grad=True)
    optimizer = torch.optim.Adam(outer.values(), 0.01)
    for step in range(200):
        tasks = fewshot.sinusoids(16, 10, 10, generator=generator)
        optimizer.zero_grad()
        value, _ = mf.over_tasks(meta)(outer, tasks)
        value.backward()
        optimizer.step()
        if step % 50 == 49:
            weights = ", ".join(f"{w:.2f}" for w in importance(outer))
            print(f"step {step + 1}: loss {value:.3f}, weights of the inner steps {weights}")
    return {k: v.detach() for k, v in outer.items()}


if __name__ == "__main__":
    main()
