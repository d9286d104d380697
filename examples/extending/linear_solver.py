"""A linear solver of your own: gradient descent with momentum, for implicit hypergradients.

A linear solver is any callable `(matvec, b) -> x` with `matvec(x) == b`, on dicts of tensors. It
works under `vmap` if it takes a fixed number of steps and reads no values on the host. Its
iterations are never differentiated: higher derivatives solve the equation once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import metafocus as mf
from metafocus import params as pt


@dataclass(frozen=True)
class HeavyBall:
    """`x <- x - lr (A x - b) + momentum (x - x before)`, for positive definite `A`.

    Polyak, 1964. With eigenvalues between `m` and `L`, the best choice is
    `lr = 4 / (sqrt L + sqrt m)^2` and `momentum = ((sqrt L - sqrt m) / (sqrt L + sqrt m))^2`.
    """

    steps: int
    lr: float
    momentum: float

    def __call__(self, matvec, b):
        x = before = pt.zeros_like(b)
        for _ in range(self.steps):
            residual = pt.sub(matvec(x), b)
            moved = pt.add(x, residual, -self.lr)
            x, before = pt.add(moved, pt.sub(x, before), self.momentum), x
        return x


def main() -> mf.Comparison:
    """Learn a penalty for each of 20 weights of a linear model, by three linear solvers."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 40, 20, generator=generator), torch.randn(2, 40, generator=generator)

    def train(fast, slow, data):
        penalty = (slow["log_l2"].exp() * fast["w"] ** 2).sum()
        return validate(fast, slow, data) + penalty

    def validate(fast, slow, data):
        return ((data[0] @ fast["w"] - data[1]) ** 2).mean()

    result = mf.compare(
        mf.Problem(train, validate, init=lambda slow, support: {"w": torch.zeros(20)}),
        {"log_l2": torch.full((20,), -3.0)},
        mf.Episode((x[0], y[0]), (x[1], y[1])),
        solver=mf.SGD(0.1, steps=400),
        estimators={
            "CG, 10 products": mf.Implicit(mf.CG(10)),
            "heavy ball, 20 products": mf.Implicit(HeavyBall(20, lr=0.2, momentum=0.4)),
            "Neumann, 20 terms": mf.Implicit(mf.Neumann(20, scale=0.1)),
        },
        reference=mf.Implicit(mf.Dense()),
    )
    print(result.table())
    return result


if __name__ == "__main__":
    main()
