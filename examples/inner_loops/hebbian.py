"""A Hebbian update: fast weights that no gradient moves.

Differentiable plasticity (arXiv 1804.02464): a network sees pairs of patterns, one at each step,
and writes them into fast weights by a local rule, `hebb <- hebb + rate (x y' - hebb)`. How fast it
writes and how much it trusts what it wrote are learned. A solver with a method `direction` brings
a rule of its own in place of the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import metafocus as mf


@dataclass(frozen=True)
class Hebbian:
    """Write the pair of each step into `hebb`."""

    steps: int

    def init(self, params):
        return None

    def direction(self, inner_loss, params, outer, data):
        x, y = data
        return inner_loss(params, outer, data), {"hebb": params["hebb"] - torch.outer(x, y)}

    def update(self, params, grads, state, step, outer):
        rate = torch.sigmoid(outer["rate"])
        return {"hebb": params["hebb"] - rate * grads["hebb"]}, state


def recall(fast, slow, data):
    x, y = data
    return ((torch.tanh(x @ (slow["w"] + slow["trust"] * fast["hebb"])) - y) ** 2).mean()


problem = mf.Problem(recall, recall, init=lambda slow, _: {"hebb": torch.zeros_like(slow["w"])})


def main() -> list[float]:
    """Remember four pairs of patterns of signs, each seen once; then recall them all."""
    generator = torch.Generator().manual_seed(0)
    meta = mf.over_tasks(mf.bilevel(problem, solver=Hebbian(4), estimator=mf.Unrolled()))

    def draw(tasks: int) -> mf.Episode:
        x, y = torch.randn(2, tasks, 4, 20, generator=generator).sign()
        return mf.Episode(mf.PerStep((x, y)), (x, y))

    outer = {"w": torch.zeros(20, 20), "trust": torch.tensor(0.1), "rate": torch.tensor(-2.0)}
    outer = {k: v.requires_grad_() for k, v in outer.items()}
    optimizer, losses = torch.optim.Adam(outer.values(), 0.05), []
    for step in range(150):
        optimizer.zero_grad()
        value, _ = meta(outer, draw(32))
        value.backward()
        optimizer.step()
        losses.append(value.item())
        if step % 50 == 49:
            rate, trust = torch.sigmoid(outer["rate"]), outer["trust"]
            print(f"step {step + 1}: error {value:.3f}, rate {rate:.2f}, trust {trust:.2f}")
    return losses


if __name__ == "__main__":
    main()
