"""An estimator of your own: part first-order, part exact.

An estimator is any callable `(inner_loss, solver, start, outer, support) -> Solution`. It returns
adapted fast weights, and how they depend on `outer` is the hypergradient. Estimators whose fast
weights have equal values can be added. This one takes `(1 - share)` of one derivative and `share`
of another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import metafocus as mf


@dataclass(frozen=True)
class Mix(mf.Estimator):
    """The fast weights of `left`, with `(1 - share)` of its derivative and `share` of `right`'s."""

    share: float
    left: mf.Estimator = mf.FirstOrder()  # noqa: RUF009 - frozen, so it can be shared
    right: mf.Estimator = mf.Unrolled()  # noqa: RUF009

    def __call__(self, inner_loss, solver, start, outer, support):
        left = self.left(inner_loss, solver, start, outer, support)
        right = self.right(inner_loss, solver, start, outer, support)
        mixed = {k: v + self.share * (right.params[k] - v) for k, v in left.params.items()}
        return mf.Solution(mixed, left.losses)


def main() -> mf.Comparison:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))

    def loss(fast, slow, data):
        x, y = data
        return ((torch.func.functional_call(net, fast, (x,)) - y) ** 2).mean()

    x = torch.linspace(-2, 2, 20).reshape(2, 10, 1)
    episode = mf.Episode((x[0], x[0].sin()), (x[1], x[1].sin()))
    result = mf.compare(
        mf.Problem(loss, loss),
        mf.trainable(net),
        episode,
        solver=mf.SGD(0.1, steps=5),
        estimators={
            "first order": mf.FirstOrder(),
            "half of each": Mix(0.5),
            "exact": mf.Unrolled(),
        },
        reference="exact",
    )
    print(result.table())
    return result


if __name__ == "__main__":
    main()
