"""Micro-batches: the gradient of a batch in pieces, exact to second order, in the memory of one."""

from __future__ import annotations

import pytest
import torch
from problems import assert_close

import metafocus as mf
from metafocus.comparison.memory import peak_bytes

F64 = torch.float64
G = torch.Generator().manual_seed(0)
DATA = (
    torch.randn(24, 6, generator=G, dtype=F64),
    torch.randn(24, generator=G, dtype=F64),
    torch.arange(24),
)
OUTER = {
    "a": torch.randn(6, 16, generator=G, dtype=F64) / 2,
    "b": torch.randn(16, 16, generator=G, dtype=F64) / 4,
    "c": torch.randn(16, generator=G, dtype=F64) / 4,
    "weight": torch.randn(24, generator=G, dtype=F64),
}


def loss(fast, slow, data):
    x, y, index = data
    hidden = x @ fast["a"]
    for _ in range(6):
        hidden = torch.tanh(hidden @ fast["b"])
    return (slow["weight"][index].sigmoid() * (hidden @ fast["c"] - y) ** 2).mean()


def start(slow, support):
    return {k: slow[k] for k in "abc"}


def meta_of(estimator, pieces, solver=None):
    inner = loss if pieces is None else mf.micro_batches(loss, pieces)
    problem = mf.Problem(inner, loss, start)
    return mf.bilevel(problem, solver=solver or mf.SGD(0.1, 3, momentum=0.5), estimator=estimator)


def gradient(meta):
    leaves = {k: v.clone().requires_grad_() for k, v in OUTER.items()}
    meta(leaves, mf.Episode(DATA, DATA))[0].backward()
    return {k: v.grad for k, v in leaves.items()}


ESTIMATORS = {
    "graph": mf.Unrolled(),
    "recompute": mf.Unrolled(recompute=True),
    "recompute=2": mf.Unrolled(recompute=2),
    "store": mf.Unrolled(store=mf.stores.schedule(2)),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "first order": mf.FirstOrder(),
    "implicit": mf.Implicit(mf.CG(5)),
}


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("pieces", [1, 3, 5, 24, 100])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_hypergradient_of_the_whole_batch(name, pieces):
    # Sums in another order; CG on a Hessian that is not definite amplifies that.
    tolerance = 1e-8 if name == "implicit" else 1e-12
    whole = gradient(meta_of(ESTIMATORS[name], None))
    assert_close(gradient(meta_of(ESTIMATORS[name], pieces)), whole, tolerance)


@pytest.mark.parametrize("pieces", [2, 7])
def test_transforms_and_higher_derivatives(pieces):
    small = mf.micro_batches(loss, pieces)
    fast = start(OUTER, None)
    direction = {k: torch.ones_like(v) for k, v in fast.items()}

    def third(f):
        def gradient(p):
            return torch.func.grad(f)(p, OUTER, DATA)

        def product(p):
            return torch.func.jvp(gradient, (p,), (direction,))[1]

        return torch.func.grad(lambda p: sum((v**2).sum() for v in product(p).values()))(fast)

    assert_close(third(small), third(loss), 1e-10)
    many = {k: torch.stack([v, 0.9 * v]) for k, v in fast.items()}

    def mapped(f):
        return torch.func.vmap(torch.func.grad(f), in_dims=(0, None, None))(many, OUTER, DATA)

    assert_close(mapped(small), mapped(loss), 1e-12)


def test_the_peak_is_that_of_a_piece():
    def peak(pieces):
        meta = meta_of(mf.Unrolled(store=mf.stores.device()), pieces, mf.SGD(0.1, 2))
        gradient(meta)  # the preflight is not part of it
        return peak_bytes(lambda: gradient(meta))[1]

    whole = peak(None)
    # What does not shrink are the parameters, their gradients and the data.
    fixed = 8 * sum(v.numel() for v in OUTER.values()) * 12
    assert peak(8) < whole / 8 + fixed
    assert peak(8) < 0.5 * whole
    assert peak(8) < peak(2) < whole


def test_a_mean_over_tokens_is_weighed_by_its_count():
    labels = torch.tensor([[1, -100, 2], [3, 0, 1], [-100, -100, 4], [-100, -100, -100]])
    table = torch.randn(6, 5, generator=G, dtype=F64)

    def tokens(fast, slow, batch):
        scored = batch["labels"] != -100
        logits = fast["w"][batch["labels"].clamp(min=0)]
        each = torch.logsumexp(logits, -1) - logits[..., 0]
        return (each * scored).sum() / scored.sum().clamp(min=1)

    def count(batch):
        return (batch["labels"] != -100).sum()

    fast, batch = {"w": table}, {"labels": labels}
    small = mf.micro_batches(tokens, 4, count=count)
    assert_close(small(fast, {}, batch), tokens(fast, {}, batch), 1e-14)
    assert not torch.isclose(mf.micro_batches(tokens, 4)(fast, {}, batch), tokens(fast, {}, batch))


def test_bad_arguments():
    with pytest.raises(ValueError, match="pieces must be an integer >= 1, got 0"):
        mf.micro_batches(loss, 0)
    x, y, index = DATA
    with pytest.raises(mf.errors.ProblemError, match=r"one size there, got \[23, 24\]"):
        mf.micro_batches(loss, 2)(start(OUTER, None), OUTER, (x, y[:-1], index))
    with pytest.raises(mf.errors.ProblemError, match=r"one size there, got \[\]"):
        mf.micro_batches(loss, 2)(start(OUTER, None), OUTER, 3)
