"""The random state at one moment: kept once while nothing is drawn, and drawn from again."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
import torch

import metafocus as mf
from metafocus.rng import Drawn


def test_one_state_serves_while_nothing_is_drawn():
    first = Drawn.shared(())
    assert Drawn.shared(()) is first
    with first.again():
        torch.rand(3)
    assert Drawn.shared(()) is first
    before = torch.get_rng_state()
    drawn = torch.rand(3)
    second = Drawn.shared(())
    assert second is not first
    with first.again():
        assert torch.equal(torch.rand(3), drawn)
    # A state that comes back is found only if it is the latest one.
    torch.set_rng_state(before)
    third = Drawn.shared(())
    with third.again():
        assert torch.equal(torch.rand(3), drawn)


def test_inside_vmap_too():
    first = Drawn.shared(())
    found = []

    def one(x):
        found.append(Drawn.shared([x]))
        return x

    torch.func.vmap(one)(torch.ones(2))
    assert found == [first]


def states_kept(rate):
    """Return how many random states a rebuilt loop of eight steps keeps."""

    def loss(fast, slow, x):
        return ((torch.dropout(fast["w"], rate, rate > 0) - x) ** 2).sum()

    w = {"w": torch.ones(4, dtype=torch.float64, requires_grad=True)}
    x = torch.zeros(4, dtype=torch.float64)
    meta = mf.bilevel(
        mf.Problem(loss, lambda fast, slow, x: ((fast["w"] - x) ** 2).sum()),
        solver=mf.SGD(0.01, steps=8),
        estimator=mf.Unrolled(recompute=True),
    )
    value, _ = meta(w, mf.Episode(x, x))
    gc.collect()
    states, node, pending = set(), None, [value.grad_fn]
    while pending:
        node = pending.pop()
        spec = getattr(node, "spec", None)
        if spec is not None:
            states.add(id(spec.drawn))
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    return len(states)


def test_a_rebuilt_loop_keeps_one_state_unless_it_draws():
    assert states_kept(0.0) == 1
    assert states_kept(0.5) == 8


F64 = torch.float64
X = torch.linspace(-1.0, 1.0, 6, dtype=F64)
W = {"w": torch.linspace(0.5, 1.5, 6, dtype=F64)}
REBUILT = {
    "one": mf.Unrolled(recompute=True),
    "segments": mf.Unrolled(recompute=2),
    "store": mf.Unrolled(store=mf.stores.cpu()),
    "schedule": mf.Unrolled(store=mf.stores.schedule(2)),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
}


def some_steps_drop(fast, slow, data):
    """Dropout at the steps whose flag is 1; the others draw nothing."""
    x, flag = data
    w = fast["w"] ** 3
    return ((torch.dropout(w, 0.5, True) if flag == 1 else w) - slow["w"] * x).square().mean()


def remade(fast, slow, data):
    """The same loss, which is itself recomputed."""
    return mf.recompute(some_steps_drop, fast, slow, data)


def final(fast, slow, data):
    return (fast["w"] - data[0]).square().sum()


def hypergradient(estimator, loss, flags):
    support = mf.Batches(lambda step: (X + step, flags[step]), steps=len(flags))
    meta = mf.bilevel(mf.Problem(loss, final), solver=mf.SGD(0.05, len(flags)), estimator=estimator)
    torch.manual_seed(0)
    found = mf.hypergrad(meta)(W, mf.Episode(support, (X, 0)))
    return found[0]["w"], torch.rand(1)


@pytest.mark.parametrize("loss", [some_steps_drop, remade], ids=["plain", "nested"])
@pytest.mark.parametrize("flags", ["0110", "1001", "0001", "1000", "0000"])
@pytest.mark.parametrize("name", REBUILT)
def test_dropout_at_some_steps_is_replayed(name, flags, loss):
    """The graph of all steps is the reference: it draws each number once."""
    flags = [int(flag) for flag in flags]
    want, after = hypergradient(mf.Unrolled(), some_steps_drop, flags)
    got, later = hypergradient(REBUILT[name], loss, flags)
    # Float64, and the same products in another order.
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert torch.equal(later, after), "the backward pass draws nothing from the global state"


def own_generator():
    generator = torch.Generator().manual_seed(1)

    def draw():
        return torch.rand(6, generator=generator, dtype=F64)

    return draw, generator.get_state


def python():
    return lambda: random.random(), random.getstate


def numpy_global():
    return lambda: np.random.rand(), lambda: np.random.get_state()[2]


@pytest.mark.parametrize("source", [own_generator, python, numpy_global])
@pytest.mark.parametrize("name", [*REBUILT, "finite", "implicit", "penalty"])
def test_numbers_that_a_rebuild_cannot_draw_again_are_refused(name, source):
    others = {
        "finite": mf.Unrolled(hvp=mf.hvp_finite()),
        "implicit": mf.Implicit(mf.CG(2)),
        "penalty": mf.Penalty(10.0),
    }
    draw, state = source()

    def loss(fast, slow, x):
        return (fast["w"] * draw() - slow["w"] * x).square().mean()

    before = state()
    problem = mf.Problem(loss, lambda fast, slow, x: (fast["w"] - x).square().sum())
    estimator = {**REBUILT, **others}[name]
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=estimator)
    with pytest.raises(mf.errors.ProblemError, match="draws random numbers from"):
        mf.hypergrad(meta)(W, mf.Episode(X, X))
    assert str(state()) == str(before), "the trial gives its numbers back"


@pytest.mark.parametrize("estimator", [mf.FirstOrder(), mf.Unrolled()], ids=repr)
def test_an_own_generator_is_fine_where_a_loss_runs_once(estimator):
    """The first call, with its trial, draws what a later one draws."""
    generator, found = torch.Generator(), []

    def loss(fast, slow, x):
        noise = torch.rand(6, generator=generator, dtype=F64)
        return (fast["w"] * noise - slow["w"] * x).square().mean()

    problem = mf.Problem(loss, lambda fast, slow, x: (fast["w"] - x).square().sum())
    gradient = mf.hypergrad(mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=estimator))
    for _ in range(2):
        generator.manual_seed(0)
        found.append(gradient(W, mf.Episode(X, X))[0]["w"])
    assert torch.equal(*found)


def test_the_global_generator_given_explicitly_is_replayed():
    def loss(fast, slow, x):
        noise = torch.rand(6, generator=torch.default_generator, dtype=F64)
        return (fast["w"] ** 2 * noise - slow["w"] * x).square().mean()

    problem = mf.Problem(loss, lambda fast, slow, x: (fast["w"] - x).square().sum())
    found = []
    for estimator in (mf.Unrolled(), mf.Unrolled(recompute=True)):
        meta = mf.bilevel(problem, solver=mf.SGD(0.1, 3), estimator=estimator)
        torch.manual_seed(0)
        found.append(mf.hypergrad(meta)(W, mf.Episode(X, X))[0]["w"])
    # Float64, and the same products in another order.
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
