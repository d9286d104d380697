"""A start made from the support: Proto-MAML.

The linear layer that adapts does not start at learned weights but at the classifier that the
prototypes of this task give, `w_k = 2 c_k` and `b_k = -|c_k|^2` for the mean embedding `c_k` of
class `k` (arXiv 1903.03096). `init` sees the slow weights and the support.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import metafocus as mf

WAY = 3


def embed(slow, x):
    return torch.tanh(x @ slow["embed"])


def prototypes(slow, support):
    x, y = support
    member = (y[:, None] == torch.arange(WAY, device=y.device)).to(x)
    centre = member.T @ embed(slow, x) / member.sum(0)[:, None]
    return {"w": 2 * centre.T, "b": -(centre**2).sum(1)}


def loss(fast, slow, data):
    x, y = data
    return F.cross_entropy(embed(slow, x) @ fast["w"] + fast["b"], y)


problem = mf.Problem(loss, loss, init=prototypes)
meta = mf.bilevel(problem, solver=mf.SGD(0.1, steps=3), estimator=mf.Unrolled())


def main() -> list[float]:
    """Learn an embedding of noisy points whose class is in two of their ten coordinates."""
    generator = torch.Generator().manual_seed(0)

    def draw(tasks: int) -> mf.Episode:
        y = torch.arange(WAY).repeat(tasks, 4)
        centre = 3 * torch.randn(tasks, WAY, 2, generator=generator)
        x = 2 * torch.randn(tasks, y.shape[1], 10, generator=generator)
        x[..., :2] = 0.3 * x[..., :2] + torch.gather(centre, 1, y[..., None].expand(-1, -1, 2))
        return mf.Episode((x[:, :6], y[:, :6]), (x[:, 6:], y[:, 6:]))

    outer = {"embed": 0.3 * torch.randn(10, 8, generator=generator)}
    losses = []
    for step in range(150):
        grads, (value, _) = mf.hypergrad(mf.over_tasks(meta))(outer, draw(16))
        outer = {k: v - 0.3 * grads[k] for k, v in outer.items()}
        losses.append(value.item())
        if step % 50 == 49:
            print(f"step {step + 1}: loss {sum(losses[-20:]) / 20:.3f}")
    return losses


if __name__ == "__main__":
    main()
