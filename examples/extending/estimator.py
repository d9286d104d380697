"""An estimator of your own: part first-order, part exact.

An estimator is any function `(inner_loss, solver, start, outer, support) -> Solution`, or an object
of a subclass of `mf.Estimator`. It returns adapted fast weights, and their dependence on `outer` is
the hypergradient.
Estimators whose fast weights have equal values can be added: here `(1 - share)` of one derivative
and `share` of another. With the keyword `path`, the class works with `mf.bilevel(..., path=)` too.
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

    def __call__(self, inner_loss, solver, start, outer, support, *, path=()):
        args = (inner_loss, solver, start, outer, support)
        left, right = self.left(*args, path=path), self.right(*args, path=path)
        mixed = tuple(map(self.mixed, left.path, right.path))
        return mf.Solution(self.mixed(left.params, right.params), left.losses, mixed)

    def mixed(self, left, right):
        return {k: v + self.share * (right[k] - v) for k, v in left.items()}


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
