"""The random state at one moment: kept once while nothing is drawn, and drawn from again."""

from __future__ import annotations

import gc

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
