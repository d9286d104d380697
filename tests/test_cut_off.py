"""What a loss cuts off with `no_grad()` or `.data`, and graphs of its own, under every estimator.

The reference is the inner loop written on the tape of torch.
"""

from __future__ import annotations

import pytest
import torch

import metafocus as mf
from metafocus.errors import ProblemError

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 3
EXACT = {
    "graph": mf.Unrolled(),
    "recompute": mf.Unrolled(recompute=True),
    "recompute auto": mf.Unrolled(recompute="auto"),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
}


def under_no_grad(f, s, d):
    with torch.no_grad():
        target = (d @ f["w"]) * s["a"]
        with torch.enable_grad():
            attached = (f["w"] ** 3).sum()
    return ((d @ f["w"] * s["a"] - target - 1) ** 2).mean() * s["b"] + attached * s["a"]


def data_read(f, s, d):
    return ((d @ f["w"] - 1) ** 2).mean() + s["a"] * (f["w"].data ** 2 * f["w"]).sum() * s["b"]


def functional_inside(f, s, d):
    slopes = torch.func.vmap(torch.func.grad(lambda x: torch.tanh(x @ f["w"])))(d)
    return ((d @ f["w"] - 1) ** 2).mean() + s["a"] * s["b"] * (slopes**2).sum()


LOSSES = {"no_grad": under_no_grad, "data": data_read, "torch.func": functional_inside}


def validation(f, s, d):
    return ((d @ f["w"] + 1) ** 2).mean()


def outer_and_data():
    g = torch.Generator().manual_seed(0)
    outer = {"a": torch.tensor(0.3), "b": torch.tensor(0.7), "w": torch.randn(3, generator=g)}
    return outer, torch.randn(6, 3, generator=g), torch.randn(6, 3, generator=g)


def by_hand(loss):
    """The hypergradient of plain gradient descent, from torch alone."""
    outer, x, xq = outer_and_data()
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    fast = {"w": leaves["w"]}
    for _ in range(STEPS):
        (g,) = torch.autograd.grad(loss(fast, leaves, x), fast["w"], create_graph=True)
        fast = {"w": fast["w"] - 0.1 * g}
    value = validation(fast, leaves, xq)
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def by_backward(meta):
    outer, x, xq = outer_and_data()
    leaves = {k: v.requires_grad_() for k, v in outer.items()}
    meta(leaves, mf.Episode(x, xq))[0].backward()
    return {k: v.grad for k, v in leaves.items()}


def by_func_grad(meta):
    outer, x, xq = outer_and_data()
    return torch.func.grad(lambda o: meta(o, mf.Episode(x, xq))[0])(outer)


def by_tasks(meta):
    outer, x, xq = outer_and_data()
    episodes = mf.stack_episodes([mf.Episode(x, xq)] * 2)
    return mf.hypergrad(mf.over_tasks(meta))(outer, episodes)[0]


WAYS = {"backward": by_backward, "func.grad": by_func_grad, "over tasks": by_tasks}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", LOSSES)
def test_what_a_loss_cuts_off_is_cut_off_everywhere(kind, name, way):
    loss = LOSSES[kind]
    problem = mf.Problem(loss, validation, init=lambda slow, support: {"w": slow["w"]})
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, STEPS), estimator=EXACT[name])
    # The order of float64 sums.
    torch.testing.assert_close(WAYS[way](meta), by_hand(loss), rtol=1e-10, atol=1e-12)


def test_forward_mode_is_on_again_after_a_loss_without_gradients():
    outer, x, _ = outer_and_data()
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            mf.hvp_forward(
                mf.differentiable_twice(lambda f: under_no_grad(f, outer, x)), {"w": outer["w"]}
            )[1]({"w": torch.ones(3)})
        one = torch.ones(())
        assert torch.func.jvp(lambda t: t**2, (one,), (one,))[1] == 2


@pytest.mark.parametrize("inside", ["graph", "recompute", "forward"])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("way", WAYS)
def test_a_bilevel_problem_in_the_inner_loss(name, inside, way):
    lower = mf.Problem(
        lambda f, s, d: ((f["u"] - s["w"] * d.mean(0)) ** 2).sum() + (f["u"] ** 4).sum(),
        validation_of_u,
        init=lambda slow, support: {"u": torch.zeros(3)},
    )
    solver = mf.SGD(0.1, STEPS)

    def three_levels(estimator):
        meta = mf.bilevel(lower, solver=solver, estimator=estimator)

        def loss(f, s, d):
            return meta({"w": f["w"]}, mf.Episode(d, d))[0] + s["a"] * s["b"] * (f["w"] ** 2).sum()

        return loss

    problem = mf.Problem(
        three_levels(EXACT[inside]), validation, init=lambda slow, support: {"w": slow["w"]}
    )
    got = WAYS[way](mf.bilevel(problem, solver=solver, estimator=EXACT[name]))
    want = by_hand(lambda f, s, d: lower_by_hand(f, d) + s["a"] * s["b"] * (f["w"] ** 2).sum())
    # The order of float64 sums, through two levels.
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def validation_of_u(f, s, d):
    return ((d @ f["u"] + 1) ** 2).mean()


def lower_by_hand(f, d):
    u = torch.zeros(3)
    for _ in range(STEPS):
        u = u - 0.1 * (2 * (u - f["w"] * d.mean(0)) + 4 * u**3)
    return validation_of_u({"u": u}, {}, d)


EVERY = {
    **EXACT,
    "first": mf.FirstOrder(),
    "implicit": mf.Implicit(mf.CG(3)),
    "penalty": mf.Penalty(10.0),
    "evograd": mf.EvoGrad(0.1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EVERY)
def test_an_init_that_detaches_what_nothing_else_reads_is_refused(name, way):
    def loss(f, s, d):
        return validation({"w": f["w"] * f["a"] * f["b"]}, s, d)

    def detached(slow, support):
        return {k: v.detach().clone() for k, v in slow.items()}

    solver = mf.SGD(0.01, STEPS)
    cut = mf.Problem(loss, loss, init=detached)
    with pytest.raises(ProblemError, match="init detaches the slow weights"):
        WAYS[way](mf.bilevel(cut, solver=solver, estimator=EVERY[name]))


@pytest.mark.parametrize("way", WAYS)
def test_an_init_may_detach_what_a_loss_reads(way):
    def loss(f, s, d):
        return validation({"w": f["w"] * f["a"] * f["b"]}, s, d)

    def detached(slow, support):
        return {k: v.detach().clone() for k, v in slow.items()}

    pulled = mf.Problem(mf.proximal(loss, 2.0), loss, init=detached)
    grads = WAYS[way](mf.bilevel(pulled, solver=mf.SGD(0.01, STEPS), estimator=mf.Unrolled()))
    assert all(bool((g != 0).all()) for g in grads.values())


def test_data_on_another_device_are_named():
    outer, x, xq = outer_and_data()
    meta = mf.bilevel(
        mf.Problem(data_read, validation, init=lambda slow, support: {"w": slow["w"]}),
        solver=mf.SGD(0.1, STEPS),
        estimator=mf.Unrolled(),
    )
    with pytest.raises(ProblemError, match="the support is on meta where the fast weights are on"):
        mf.hypergrad(meta)(outer, mf.Episode(x.to("meta"), xq))
