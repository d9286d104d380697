"""Containers that torch does not take apart: refused by name where their tensors would be lost."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from transformers import BatchEncoding

import metafocus as mf
from metafocus.errors import ClosureError, ProblemError

pytestmark = pytest.mark.usefixtures("float64")


@dataclasses.dataclass
class Batch:
    x: torch.Tensor


@dataclasses.dataclass
class Nested:
    parts: dict


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Sub(dict):
    pass


SEALED = {
    "dataclass": (Batch, lambda d: d.x),
    "dataclass of a dict": (lambda x: Nested({"x": [x]}), lambda d: d.parts["x"][0]),
    "slots": (Slots, lambda d: d.x),
    "namespace": (lambda x: SimpleNamespace(x=x), lambda d: d.x),
    "UserDict": (lambda x: UserDict(x=x), lambda d: d["x"]),
    "subclass of dict": (lambda x: Sub(x=x), lambda d: d["x"]),
    "BatchEncoding": (lambda x: BatchEncoding({"x": x}), lambda d: d["x"]),
}
EXPLICIT = {
    "recompute": mf.Unrolled(recompute=True),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "implicit": mf.Implicit(mf.CG(3)),
    "penalty": mf.Penalty(10.0),
}
X = torch.linspace(-1, 1, 6).view(2, 3).double()
OUTER = {"a": torch.tensor([0.5, -0.2, 0.8], dtype=torch.float64)}


def problem(make, take):
    def inner(fast, slow, data):
        return ((take(data) @ fast["w"] - 1) ** 2).mean()

    def upper(fast, slow, data):
        return ((fast["w"] - 1) ** 2).sum()

    def prepare(slow, episode):
        return mf.Episode(make(torch.tanh(take(episode.support) * slow["a"])), episode.query)

    def init(slow, support):
        return {"w": torch.zeros(3)}

    return mf.Problem(inner, upper, init, prepare)


def meta(kind, estimator):
    return mf.bilevel(problem(*SEALED[kind]), solver=mf.SGD(0.1, 3), estimator=estimator)


@pytest.mark.parametrize("estimator", EXPLICIT)
@pytest.mark.parametrize("kind", SEALED)
def test_a_support_that_depends_on_outer_is_refused_in_a_sealed_container(kind, estimator):
    make, _ = SEALED[kind]
    episode = mf.Episode(make(X), X)
    with pytest.raises(ClosureError, match=rf"the support holds a {type(make(X)).__name__}, which"):
        mf.hypergrad(meta(kind, EXPLICIT[estimator]))(OUTER, episode)


@pytest.mark.parametrize("kind", SEALED)
def test_on_the_tape_it_is_exact(kind):
    make, _ = SEALED[kind]
    plain = mf.bilevel(
        problem(lambda x: (x,), lambda d: d[0]), solver=mf.SGD(0.1, 3), estimator=mf.Unrolled()
    )
    found = mf.hypergrad(meta(kind, mf.Unrolled()))(OUTER, mf.Episode(make(X), X))[0]
    exact = mf.hypergrad(plain)(OUTER, mf.Episode((X,), X))[0]
    assert torch.equal(found["a"], exact["a"])


@pytest.mark.parametrize("kind", SEALED)
def test_a_constant_support_may_be_sealed(kind):
    make, take = SEALED[kind]

    def loss(fast, slow, data):
        return ((take(data) @ fast["w"] - 1) ** 2).mean()

    maml = mf.bilevel(
        mf.Problem(loss, loss), solver=mf.SGD(0.1, 3), estimator=mf.Unrolled(recompute=True)
    )
    episode = mf.Episode(make(X), make(X))
    assert mf.hypergrad(maml)({"w": OUTER["a"]}, episode)[0]["w"].isfinite().all()


@pytest.mark.parametrize("how", ["vmap", "loop"])
@pytest.mark.parametrize("kind", SEALED)
def test_tasks_in_sealed_containers_are_refused(kind, how):
    make, _ = SEALED[kind]
    tasks = mf.Episode(make(torch.stack([X, 2 * X])), torch.stack([X, X]))
    with pytest.raises(ProblemError, match="does not know as a container: every task would see"):
        mf.hypergrad(mf.over_tasks(meta(kind, mf.Unrolled()), how=how))(OUTER, tasks)


@pytest.mark.parametrize("kind", SEALED)
def test_sealed_containers_are_not_stacked(kind):
    make, _ = SEALED[kind]
    with pytest.raises(ProblemError, match=r"does not know as a container.*cannot be stacked"):
        mf.stack_episodes([mf.Episode(make(X), X), mf.Episode(make(X), X)])
