"""Hooks in a loss that change a gradient: respected, or refused where torch would not run them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from problems import F64, assert_close

import metafocus as mf
from metafocus.errors import TransformError

RATE, STEPS = 0.3, 2
EPISODE = mf.Episode(torch.tensor([0.7, -0.4], dtype=F64), torch.tensor([0.2, 0.9], dtype=F64))
OUTER = {"w": torch.tensor([0.5, -1.2], dtype=F64), "s": torch.tensor([0.8, 0.3], dtype=F64)}
EXACT, FIRST = mf.Unrolled(), mf.FirstOrder()


def plain(fast, slow, x):
    return ((torch.tanh(fast["w"] * slow["s"]) - x) ** 2).sum()


def halved(guard: bool):
    def loss(fast, slow, x):
        z = fast["w"] * slow["s"]
        if z.requires_grad or not guard:
            # A loss without the guard fails in torch's words where it meets a constant.
            with contextlib.suppress(RuntimeError) if not guard else contextlib.nullcontext():
                z.register_hook(lambda g: 0.5 * g)
        return ((torch.tanh(z) - x) ** 2).sum()

    return loss


def by_hand(inner, outer_loss):
    """Return the unrolled gradient, by a loop of torch alone."""
    outer = {k: v.clone().requires_grad_() for k, v in OUTER.items()}
    fast = {"w": outer["w"]}
    for _ in range(STEPS):
        (g,) = torch.autograd.grad(
            inner(fast, outer, EPISODE.support), fast["w"], create_graph=True
        )
        fast = {"w": fast["w"] - RATE * g}
    value = outer_loss(fast, outer, EPISODE.query)
    return dict(zip(outer, torch.autograd.grad(value, [*outer.values()]), strict=True))


def meta_of(inner, outer_loss, estimator=EXACT):
    problem = mf.Problem(inner, outer_loss, init=lambda slow, support: {"w": slow["w"]})
    return mf.bilevel(problem, solver=mf.SGD(RATE, STEPS), estimator=estimator)


def sides(guard: bool):
    return {"inner": (halved(guard), plain), "outer": (plain, halved(guard))}


def tasks():
    return mf.stack_episodes([EPISODE, EPISODE])


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("side", ["inner", "outer"])
def test_on_the_tape_hooks_are_respected(side, guard):
    losses = sides(guard)[side]
    meta = meta_of(*losses)
    want = by_hand(*losses)
    assert_close(mf.hypergrad(meta)(OUTER, EPISODE)[0], want, 1e-12)
    assert_close(mf.hypergrad(mf.over_tasks(meta, how="loop"))(OUTER, tasks())[0], want, 1e-12)


WAYS = {
    "over_tasks": lambda meta: mf.hypergrad(mf.over_tasks(meta))(OUTER, tasks()),
    "torch.func.grad": lambda meta: torch.func.grad(meta, has_aux=True)(OUTER, EPISODE),
    "vmap of hypergrad": lambda meta: torch.func.vmap(mf.hypergrad(meta), in_dims=(None, 0))(
        OUTER, tasks()
    ),
    "torch.func.jvp": lambda meta: torch.func.jvp(
        lambda outer: meta(outer, EPISODE)[0], (OUTER,), (OUTER,)
    ),
}


@pytest.mark.parametrize("estimator", [EXACT, FIRST], ids=str)
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("side", ["inner", "outer"])
@pytest.mark.parametrize("way", WAYS)
def test_transforms_refuse_hooks_that_change_gradients(way, side, guard, estimator):
    meta = meta_of(*sides(guard)[side], estimator)
    with pytest.raises(TransformError, match=rf"{side}_loss changes a gradient by register_hook"):
        WAYS[way](meta)


@pytest.mark.parametrize("side", ["inner", "outer"])
@pytest.mark.parametrize("way", WAYS)
def test_also_where_the_first_call_was_on_the_tape(way, side):
    meta = meta_of(*sides(True)[side])
    mf.hypergrad(meta)(OUTER, EPISODE)
    with pytest.raises(TransformError, match=rf"{side}_loss changes a gradient"):
        WAYS[way](meta)


@pytest.mark.parametrize(
    "estimator",
    [
        mf.Unrolled(recompute=True),
        mf.Unrolled(hvp=mf.hvp_forward),
        mf.Unrolled(hvp=mf.hvp_finite()),
        mf.Implicit(mf.CG(2)),
        mf.Penalty(0.1),
    ],
    ids=str,
)
def test_estimators_of_explicit_tensors_refuse_them(estimator):
    with pytest.raises(TransformError, match="products of this estimator do not follow"):
        mf.hypergrad(meta_of(*sides(True)["inner"], estimator))(OUTER, EPISODE)


@pytest.mark.parametrize("hook", [lambda g: None, lambda g: g], ids=["nothing", "what is given"])
@pytest.mark.parametrize("side", ["inner", "outer"])
@pytest.mark.parametrize("way", WAYS)
def test_hooks_that_only_look_are_let_through(way, side, hook):
    def loss(fast, slow, x):
        z = fast["w"] * slow["s"]
        if z.requires_grad:
            z.register_hook(hook)
        return ((torch.tanh(z) - x) ** 2).sum()

    losses = (loss, plain) if side == "inner" else (plain, loss)
    found, want = (WAYS[way](meta_of(*pair)) for pair in (losses, (plain, plain)))
    assert_close(found[0], want[0], 1e-12)
