"""Another minibatch at each inner step: which training samples help, by gradient?

The inner loop is a training run of minibatches over three epochs. Each sample has a weight, an
outer parameter; rows of `mf.Batches.from_dataset` keep their number, so the loss can look it up.
The batches are fetched step by step, and once more where a step is rebuilt. For many tasks at once,
`mf.PerStep` holds the batches as tensors instead.
"""

from __future__ import annotations

import torch

import metafocus as mf


def inner(fast, slow, batch):
    error = (batch["x"] @ fast["w"] - batch["y"]) ** 2
    return (torch.sigmoid(slow["weight"][batch["index"]]) * error).mean()


def validation(fast, slow, data):
    return ((data["x"] @ fast["w"] - data["y"]) ** 2).mean()


def run(rows, steps, batch_size, generator):
    """Return the stream of batches, and the validation loss after training on them."""
    stream = mf.Batches.from_dataset(rows, batch_size=batch_size, steps=steps, generator=generator)
    zeros = torch.zeros_like(rows[0]["x"])
    problem = mf.Problem(inner, validation, init=lambda slow, support: {"w": zeros})
    solver = mf.SGD(0.1, steps, momentum=0.5)
    return stream, mf.bilevel(problem, solver=solver, estimator=mf.Unrolled(recompute=10))


def main() -> torch.Tensor:
    """Every fourth label is wrong; the gradient of the validation loss finds out which."""
    generator = torch.Generator().manual_seed(0)
    x, truth = torch.randn(100, 5, generator=generator), torch.ones(5)
    wrong = torch.arange(100) % 4 == 0
    y = torch.where(wrong, torch.randn(100, generator=generator), x @ truth)
    rows = [{"x": x[i], "y": y[i]} for i in range(80)]
    clean = {"x": x[80:], "y": x[80:] @ truth}
    stream, meta = run(rows, steps=30, batch_size=8, generator=generator)
    slow = {"weight": torch.zeros(80, requires_grad=True)}
    optimizer = torch.optim.Adam(slow.values(), 0.2)
    for step in range(30):
        optimizer.zero_grad()
        loss, _ = meta(slow, mf.Episode(stream, clean))
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            weight = torch.sigmoid(slow["weight"].detach())
            right, bad = weight[~wrong[:80]].median(), weight[wrong[:80]].median()
            print(f"step {step + 1}: loss {loss:.4f}, median weight {right:.2f}, wrong {bad:.2f}")
    return torch.sigmoid(slow["weight"].detach())


if __name__ == "__main__":
    main()
