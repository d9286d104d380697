"""Gradients of many tasks on the tape, and meta losses that are differentiated piece by piece."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

import metafocus as mf
from metafocus.comparison.memory import peak_bytes
from metafocus.torch_internals import sole_vmap

TASKS = 5
# Seeded here: a net drawn after other modules have drawn may have a gradient entry near zero, which
# Adam divides by.
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def loss(fast, slow, batch):
    x, y = batch
    weights = {k: v for k, v in fast.items() if k != "lr"}
    return ((functional_call(NET, weights, (x,)) - y) ** 2).mean()


def episodes(tasks=TASKS, points=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tasks, 2, points, 3, dtype=torch.float64, generator=generator)
    y = x.sin().sum(-1, keepdim=True)
    return mf.Episode((x[:, 0], y[:, 0]), (x[:, 1], y[:, 1]))


def start():
    rate = torch.tensor(0.1, dtype=torch.float64)
    return {**{k: v.detach().clone() for k, v in NET.named_parameters()}, "lr": rate}


def weights_of(slow, support):
    return {k: v for k, v in slow.items() if k != "lr"}


MAML = mf.Problem(loss, loss, init=weights_of)
SOLVERS = {
    "sgd": mf.SGD(0.1, 3),
    "momentum, clip, decay": mf.SGD(
        0.1, 3, momentum=0.9, nesterov=True, weight_decay=0.1, clip=mf.clip_global(0.5)
    ),
    "learned rate": mf.SGD(lambda outer: outer["lr"], 3, momentum=0.5),
    "adam": mf.Adam(0.1, 3),
}
ESTIMATORS = {
    "unrolled": mf.Unrolled(),
    "last": mf.Unrolled(last=1),
    "recompute": mf.Unrolled(recompute=2),
    "first order": mf.FirstOrder(),
}
LAYOUTS = {
    "vmap": {},
    "chunks": {"chunk_size": 2},
    "whole chunk": {"chunk_size": 9},
    "loop": {"how": "loop"},
}


def apart(a, b):
    a, b = (torch.cat([v.reshape(-1) for v in g.values()]) for g in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_layout_gives_the_mean_of_single_hypergradients(layout, solver, estimator):
    meta = mf.bilevel(MAML, solver=SOLVERS[solver], estimator=ESTIMATORS[estimator])
    outer, batch = start(), episodes()
    grads, (value, aux) = mf.hypergrad(mf.over_tasks(meta, **LAYOUTS[layout]))(outer, batch)
    singles = []
    for i in range(TASKS):
        one = mf.Episode(*((x[i], y[i]) for x, y in batch))
        singles.append(mf.hypergrad(meta)(outer, one))
    mean = {k: sum(g[k] for g, _ in singles) / TASKS for k in outer}
    # Sums of 5 tasks in another order.
    assert apart(grads, mean) < 1e-13
    torch.testing.assert_close(value, sum(v for _, (v, _) in singles) / TASKS)
    losses = torch.stack([a.inner_losses for _, (_, a) in singles])
    torch.testing.assert_close(aux.inner_losses, losses)
    assert aux.params["0.weight"].shape == (TASKS, 8, 3)
    assert not aux.params["0.weight"].requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_and_transforms_agree_with_hypergrad(layout):
    meta = mf.bilevel(MAML, solver=SOLVERS["momentum, clip, decay"], estimator=mf.Unrolled())
    whole = mf.over_tasks(meta, **LAYOUTS[layout])
    outer, batch = start(), episodes()
    grads, _ = mf.hypergrad(whole)(outer, batch)
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    whole(leaves, batch)[0].backward()
    taped = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
    func = torch.func.grad(lambda o: whole(o, batch)[0])(outer)
    assert apart(taped, grads) < 1e-13
    assert apart(func, grads) < 1e-13


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_hypergradient_can_be_differentiated_again(layout):
    meta = mf.bilevel(MAML, solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())
    whole = mf.over_tasks(meta, **LAYOUTS[layout])
    batch = episodes(3)
    weights = weights_of(start(), None)
    leaves = {k: v.clone().requires_grad_() for k, v in weights.items()}
    grads, _ = mf.hypergrad(whole)(leaves, batch)
    square = sum((g**2).sum() for g in grads.values())
    taped = dict(zip(leaves, torch.autograd.grad(square, list(leaves.values())), strict=True))

    def of(outer):
        grads = torch.func.grad(lambda o: whole(o, batch)[0])(outer)
        return sum((g**2).sum() for g in grads.values())

    # Third derivatives: 1e-16 amplified by their size.
    assert apart(taped, torch.func.grad(of)(weights)) < 1e-11


def test_a_start_whose_weights_depend_on_each_other():
    def init(slow, support):
        return {"a": slow["a"], "b": 2 * slow["a"]}

    def square(fast, slow, x):
        return ((fast["a"] * x + fast["b"] ** 2) ** 2).sum()

    problem = mf.Problem(square, square, init=init)
    meta = mf.bilevel(problem, solver=mf.SGD(0.01, 2), estimator=mf.Unrolled())
    outer = {"a": torch.tensor([0.3, -0.2], dtype=torch.float64)}
    data = torch.randn(4, 2, dtype=torch.float64)
    found = [
        mf.hypergrad(mf.over_tasks(meta, how=how))(outer, mf.Episode(data, data))[0]
        for how in ("vmap", "loop")
    ]
    assert apart(*found) < 1e-14


def test_the_tape_is_used_below_one_vmap_only():
    seen = []

    def look(x):
        seen.append(sole_vmap() is not None)
        return x.sum()

    x = torch.ones(2, 2)
    look(x)
    torch.func.vmap(look)(x)
    torch.func.vmap(torch.func.vmap(look))(x[None])
    torch.func.grad(lambda x: torch.func.vmap(look)(x).sum())(x)
    torch.func.vmap(torch.func.grad(look))(x)
    assert seen == [False, True, False, False, False]


def test_under_two_vmaps():
    meta = mf.bilevel(MAML, solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())
    one, outer = episodes(4), start()
    two = mf.Episode(*(tuple(x.reshape(2, 2, *x.shape[1:]) for x in part) for part in one))
    nested = mf.over_tasks(lambda o, e: mf.over_tasks(meta)(o, e))
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items() if k != "lr"}
    value, _ = nested(leaves, two)
    grads = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    flat = mf.hypergrad(mf.over_tasks(meta))(outer, one)[0]
    assert apart(grads, weights_of(flat, None)) < 1e-13


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_draws_by_randomness(randomness):
    def noisy(fast, slow, x):
        return (nn.functional.dropout(fast["w"] * x, 0.5) ** 2).sum()

    problem = mf.Problem(noisy, noisy)
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 1), estimator=mf.Unrolled())
    outer = {"w": torch.ones(64, dtype=torch.float64)}
    data = torch.ones(2, 64, dtype=torch.float64)
    many = mf.over_tasks(meta, randomness=randomness, chunk_size=1)
    params = mf.hypergrad(many)(outer, mf.Episode(data, data))[1][1].params["w"]
    assert torch.equal(params[0], params[1]) == (randomness == "same")


@pytest.mark.parametrize("options", [{"how": "loop"}, {"chunk_size": 1}], ids=["loop", "chunks"])
def test_the_memory_of_hypergrad_is_that_of_one_piece(options):
    meta = mf.bilevel(MAML, solver=mf.SGD(0.1, 10), estimator=mf.Unrolled())
    gradient = mf.hypergrad(mf.over_tasks(meta, **options))
    peaks = []
    for tasks in (2, 8):
        batch = episodes(tasks, points=64)
        gradient(start(), batch)
        peaks.append(peak_bytes(lambda batch=batch: gradient(start(), batch))[1])
    # Beside the graph of one task, the adapted weights and losses of all: 57 + 10 numbers each.
    assert peaks[1] < 1.3 * peaks[0]


def test_a_task_that_diverges_is_named_in_every_layout():
    meta = mf.bilevel(MAML, solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())
    batch = episodes()
    batch.support[1][3] = float("nan")
    for layout in ({}, {"chunk_size": 2}):
        with pytest.raises(mf.errors.NonFiniteError, match="task 3"):
            mf.hypergrad(mf.over_tasks(meta, **layout))(start(), batch)
    with pytest.raises(mf.errors.NonFiniteError, match="Task 3"):
        mf.hypergrad(mf.over_tasks(meta, how="loop"))(start(), batch)
