"""The straight-through tie: the values of one tensor, the derivative of another, at no cost."""

from __future__ import annotations

import pytest
import torch

import metafocus as mf
from metafocus.autodiff.tied import tied_to
from metafocus.torch_internals import function_modes


@pytest.fixture(autouse=True, params=[0, 2**14], ids=["by function", "by arithmetic"])
def small(request, monkeypatch):
    monkeypatch.setattr("metafocus.autodiff.tied.SMALL", request.param)
    return request.param


VALUE = torch.tensor([2.0, -3.0], dtype=torch.float64)
SCALE = torch.tensor([0.5, 4.0], dtype=torch.float64)


def cubed(w):
    """The sum of cubes at VALUE; as a function of `w` its derivative is that of `SCALE * w`."""
    return (tied_to({"w": SCALE * w}, {"w": VALUE})["w"] ** 3).sum()


WANT = 3 * VALUE**2 * SCALE


def test_the_value_is_one_and_the_derivative_the_other(small):
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    tied = tied_to({"w": SCALE * w}, {"w": VALUE})["w"]
    # Large weights are not copied.
    assert (tied.data_ptr() == VALUE.data_ptr()) == (small == 0)
    assert torch.equal(tied, VALUE)
    (tied**3).sum().backward()
    assert torch.equal(w.grad, WANT)


def test_a_start_without_gradient_and_no_grad_give_the_constants():
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    fast = {"w": VALUE, "b": VALUE}
    tied = tied_to({"w": w, "b": w.detach()}, fast)
    assert tied["w"].requires_grad
    assert not tied["b"].requires_grad
    with torch.no_grad():
        assert not tied_to({"w": w, "b": w}, fast)["w"].requires_grad


def test_the_gradient_can_be_differentiated_again():
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(cubed(w), w, create_graph=True)
    (again,) = torch.autograd.grad(slope.sum(), w)
    assert torch.equal(again, 6 * VALUE * SCALE**2)


@pytest.mark.parametrize(
    "derivative",
    [torch.func.grad, torch.func.jacrev, torch.func.jacfwd],
    ids=["grad", "jacrev", "jacfwd"],
)
def test_transforms(derivative):
    w = torch.ones(2, dtype=torch.float64)
    assert torch.equal(derivative(cubed)(w), WANT)
    assert torch.equal(torch.func.vmap(derivative(cubed))(w.expand(3, 2)), WANT.expand(3, 2))


@pytest.mark.parametrize("inner", [torch.func.jacfwd, torch.func.jacrev], ids=["fwd", "rev"])
@pytest.mark.parametrize("outer", [torch.func.jacfwd, torch.func.jacrev], ids=["fwd", "rev"])
def test_second_derivatives_by_transforms(inner, outer):
    found = outer(inner(cubed))(torch.ones(2, dtype=torch.float64))
    assert torch.equal(found, torch.diag(6 * VALUE * SCALE**2))


def test_forward_mode_of_the_tape():
    with torch.autograd.forward_ad.dual_level():
        w = torch.autograd.forward_ad.make_dual(
            torch.ones(2, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
        )
        tangent = torch.autograd.forward_ad.unpack_dual(cubed(w)).tangent
    assert tangent == WANT[0]


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped start", "one start"])
def test_vmap_over_the_tape(mapped):
    w = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    values = torch.stack([VALUE, 2 * VALUE, -VALUE])

    def task(w, value):
        return (tied_to({"w": SCALE * w}, {"w": value})["w"] ** 3).sum()

    start = w if mapped else w[0]
    torch.func.vmap(task, in_dims=(0 if mapped else None, 0))(start, values).sum().backward()
    each = 3 * values**2 * SCALE
    assert torch.equal(w.grad if mapped else w.grad[0], each if mapped else each.sum(0))


def test_the_type_of_the_gradient_is_that_of_the_start():
    w = torch.ones(2, dtype=torch.float32, requires_grad=True)
    tied_to({"w": w}, {"w": VALUE})["w"].sum().backward()
    assert w.grad.dtype == torch.float32


def test_the_outer_loss_sees_the_tensor_that_aux_returns():
    seen = []

    def loss(fast, slow, x):
        seen.append(fast["w"].untyped_storage().data_ptr())
        return ((fast["w"] - x) ** 2).sum()

    meta = mf.bilevel(
        mf.Problem(loss, loss), solver=mf.SGD(0.1, steps=1), estimator=mf.FirstOrder()
    )
    x = torch.zeros(2, dtype=torch.float64)
    outer = {"w": VALUE.clone().requires_grad_()}
    meta(outer, mf.Episode(x, x))
    _, aux = meta(outer, mf.Episode(x, x))
    assert seen[-1] == aux.params["w"].untyped_storage().data_ptr()


def test_an_outer_loss_without_special_operators_runs_without_a_mode():
    modes = []

    def loss(fast, slow, x):
        return ((fast["w"] - x) ** 2).sum()

    def outer_loss(fast, slow, x):
        modes.append(len(function_modes()))
        return loss(fast, slow, x)

    meta = mf.bilevel(
        mf.Problem(loss, outer_loss), solver=mf.SGD(0.1, steps=1), estimator=mf.FirstOrder()
    )
    x = torch.zeros(2, dtype=torch.float64)
    outer = {"w": VALUE.clone().requires_grad_()}
    meta(outer, mf.Episode(x, x))
    del modes[:]
    meta(outer, mf.Episode(x, x))
    assert modes == [0]
    # Inside transforms some derivatives of torch are wrong: there the mode stays.
    torch.func.grad(lambda w: meta({"w": w}, mf.Episode(x, x))[0])(VALUE)
    assert modes == [0, 1]


def test_an_outer_loss_with_running_statistics_keeps_its_mode():
    norm = torch.nn.BatchNorm1d(2, dtype=torch.float64)
    before = norm.running_mean.clone()

    def loss(fast, slow, x):
        return ((fast["w"] - x) ** 2).sum()

    def outer_loss(fast, slow, x):
        return (norm(x * fast["w"]) ** 3).sum()

    meta = mf.bilevel(
        mf.Problem(loss, outer_loss), solver=mf.SGD(0.1, steps=1), estimator=mf.FirstOrder()
    )
    x = torch.arange(8.0, dtype=torch.float64).reshape(4, 2)
    for _ in range(3):
        meta({"w": VALUE.clone().requires_grad_()}, mf.Episode(x, x))
    assert torch.equal(norm.running_mean, before)
    assert norm.num_batches_tracked == 0
