"""A learned preconditioner: an inner solver whose update reads the outer parameters.

Meta-curvature (arXiv 1902.03356) learns, beside the start, the matrix that inner gradients are
multiplied with. A solver is any object with `steps`, `init` and `update`, and `update` is given
`outer`: what it does with it is differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import metafocus as mf


@dataclass(frozen=True)
class Preconditioned:
    """`w <- w - lr L L' grad`, with `L` learned."""

    lr: float
    steps: int

    def init(self, params):
        return None

    def update(self, params, grads, state, step, outer):
        factor = outer["factor"]
        return {"w": params["w"] - self.lr * factor @ (factor.T @ grads["w"])}, state


def loss(fast, slow, data):
    x, y = data
    return ((x @ fast["w"] - y) ** 2).mean()


problem = mf.Problem(loss, loss, init=lambda slow, support: {"w": slow["w"]})
meta = mf.bilevel(problem, solver=Preconditioned(0.1, steps=3), estimator=mf.Unrolled())


def main() -> list[float]:
    """Linear tasks whose inputs have scales from 0.1 to 2: plain descent is slow on them."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 0.3, 6)

    def draw(tasks: int) -> mf.Episode:
        x = scales * torch.randn(2, tasks, 20, 6, generator=generator)
        w = torch.randn(tasks, 6, generator=generator) / scales
        y = (x * w[:, None]).sum(-1)
        return mf.Episode((x[0], y[0]), (x[1], y[1]))

    outer = {"w": torch.zeros(6), "factor": torch.eye(6)}
    outer = {k: v.requires_grad_() for k, v in outer.items()}
    optimizer, losses = torch.optim.Adam(outer.values(), 0.03), []
    for step in range(300):
        optimizer.zero_grad()
        value, _ = mf.over_tasks(meta)(outer, draw(16))
        value.backward()
        optimizer.step()
        losses.append(value.item())
        if step % 100 == 99:
            gains = (outer["factor"] @ outer["factor"].T).diagonal()
            shown = ", ".join(f"{g:.2g}" for g in gains)
            print(f"step {step + 1}: loss {value:.3f}, learned gains {shown}")
    return losses


if __name__ == "__main__":
    main()
