"""A bilevel problem whose data differ from step to step, and its inner loop by hand.

Nothing of metafocus is used inside the hand-written loop: it is `torch.autograd` on the tape.
Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from problems import Case
from torch import Tensor
from ways import STEPS

import metafocus as mf

F64 = torch.float64
MOMENTUM = 0.6
ROWS = 5
"""Rows of a batch."""

SAMPLES = 11
"""Samples that the rows are drawn from; each has a learned weight."""


def predict(fast, x):
    return torch.tanh(x @ fast["w1"]) @ fast["w2"]


def inner(fast, slow, data):
    """Squared errors, each weighed by the learned weight of its sample."""
    x, y, index = data
    return (torch.sigmoid(slow["weight"][index]) * (predict(fast, x) - y) ** 2).mean()


def upper(fast, slow, data):
    """Squared errors and a direct dependence on the slow weights."""
    x, y = data
    return ((predict(fast, x) - y) ** 2).mean() + 0.1 * (slow["weight"] ** 2).sum()


def start(slow, support):
    return {k: slow[k] for k in ("w1", "w2")}


def rate(slow):
    return slow["log_lr"].exp()


def solver(steps: int = STEPS):
    """Momentum and a learned rate: a state to carry, and a rule that reads `outer`."""
    return mf.SGD(rate, steps, momentum=MOMENTUM)


def learned_path(slow):
    return torch.softmax(slow["path"], 0)


PROBLEM = mf.Problem(inner, upper, start)


def case(tasks: int = 3, steps: int = STEPS, seed: int = 0) -> Case:
    """Tasks with their own batch, support and query, at every step."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    index = torch.randint(SAMPLES, (tasks, steps, ROWS), generator=g)
    support = (randn(tasks, steps, ROWS, 3), randn(tasks, steps, ROWS), index)
    query = (randn(tasks, steps, ROWS, 3), randn(tasks, steps, ROWS))
    outer = {
        "w1": randn(3, 2),
        "w2": randn(2),
        "weight": randn(SAMPLES),
        "log_lr": torch.tensor(-1.5, dtype=F64),
        "path": randn(steps),
    }
    return Case(PROBLEM, outer, mf.Episode(mf.PerStep(support), mf.PerStep(query)))


def slices(stream: mf.PerStep) -> list[Any]:
    """What each step of a `PerStep` sees."""
    return [tuple(x[t] for x in stream.tree) for t in range(len(stream.tree[0]))]


# --- by hand ---------------------------------------------------------------------------------


def tied(fast, first):
    """The values of `fast` with the derivative of `first`."""
    return {k: fast[k].detach() + first[k] - first[k].detach() for k in fast}


def constants(tree):
    return {k: v.detach() for k, v in tree.items()}


def by_hand(first, outer, batches: Sequence[Any], last: int | None = None, loss: Any = inner):
    """The fast weights after each step of `solver()`, on the tape.

    With `last=k` the steps before the last `k` are constants and every iterate of theirs is tied
    to the start.
    """
    head = 0 if last is None else max(len(batches) - last, 0)
    fast, slow = (constants(first), constants(outer)) if head else (first, outer)
    velocity = {k: torch.zeros_like(v) for k, v in fast.items()}
    path = []
    for t, data in enumerate(batches):
        if t == head and head:
            fast, slow, velocity = tied(fast, first), outer, constants(velocity)
        if t < head:
            fast = {k: v.detach().requires_grad_() for k, v in fast.items()}
        # Copies: the first fast weights may be the slow ones, which the data may depend on.
        at = {k: v.clone() for k, v in fast.items()}
        value = loss(at, slow, data)
        found = torch.autograd.grad(value, list(at.values()), create_graph=True)
        velocity = {k: MOMENTUM * velocity[k] + g for k, g in zip(fast, found, strict=True)}
        fast = {k: v - rate(slow) * velocity[k] for k, v in fast.items()}
        path.append(tied(fast, first) if t < head else fast)
    return path


def hypergradient(outer, value) -> dict[str, Tensor]:
    """The derivative of `value(outer)`, a tensor on the tape."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in outer.items()}
    found = torch.autograd.grad(
        value(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def value(outer, batches, query, last: int | None = None) -> Tensor:
    """The outer loss after the steps on these batches, by hand."""
    return upper(by_hand(start(outer, None), outer, batches, last)[-1], outer, query)


# --- what the engine is given ----------------------------------------------------------------


def meta_of(estimator, **options):
    return mf.bilevel(PROBLEM, solver=solver(), estimator=estimator, **options)


@dataclass(frozen=True)
class Single(Case):
    """A case with one episode, which need not consist of tensors."""

    def episode(self, i: int = 0) -> mf.Episode:
        return self.episodes


class Own:
    """A user's stream: any object with `.at(step)`."""

    def __init__(self, parts: list[Any]):
        self.parts = parts

    def at(self, step: int) -> Any:
        return self.parts[step]


def batches_of(parts: list[Any]) -> mf.Batches:
    """The same data, fetched step by step: new tensors at every call."""
    return mf.Batches(lambda step: tuple(x.clone() for x in parts[step]), len(parts))


def stream_of(kind: str, support: mf.PerStep) -> Any:
    """The data of a `PerStep` as another kind of stream."""
    parts = slices(support)
    return {
        "PerStep": lambda: support,
        "Batches": lambda: batches_of(parts),
        "own": lambda: Own(parts),
        "shared": lambda: mf.shared(support),
    }[kind]()


STREAMS = ("PerStep", "Batches", "own", "shared")
