"""The two back ends for first derivatives agree, and the levels of differentiation are seen."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from problems import assert_close

import metafocus as mf
from metafocus import torch_internals
from metafocus.autodiff import grad as derivatives
from metafocus.rng import replayed

pytestmark = pytest.mark.usefixtures("float64")


def cubic(p):
    return (p["x"] ** 3).sum() + (p["y"] * p["x"].sum()).sum()


POINT = {"x": torch.tensor([1.0, -2.0], dtype=torch.float64), "y": torch.ones(1).double()}
GRADS = {"x": 3 * POINT["x"] ** 2 + 1, "y": POINT["x"].sum().reshape(1)}


def by_tape(differentiable):
    return derivatives.value_and_grad(cubic, POINT, differentiable=differentiable)


def by_functorch(differentiable):
    # vmap over one copy is the lightest transform.
    value, grads = torch.func.vmap(
        lambda p: derivatives.value_and_grad(cubic, p, differentiable=differentiable)
    )({k: v[None] for k, v in POINT.items()})
    return value[0], {k: v[0] for k, v in grads.items()}


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("back_end", [by_tape, by_functorch])
def test_both_back_ends_give_value_and_gradient(back_end, differentiable):
    value, grads = back_end(differentiable)
    assert value == cubic(POINT)
    # Sums of two terms.
    assert_close(grads, GRADS, 1e-15)
    assert not value.requires_grad


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("transform", ["tape", "functorch"])
def test_the_gradient_is_differentiable_only_when_asked(transform, differentiable):
    def total(x, c):
        _, grads = derivatives.value_and_grad(
            lambda p: (c * p["x"] ** 3).sum(), {"x": x}, differentiable=differentiable
        )
        return grads["x"].sum()

    x, c = torch.tensor([2.0]), torch.tensor([5.0])
    if transform == "functorch":
        got = torch.func.grad(total, argnums=(0, 1))(x, c)
    else:
        x, c = x.requires_grad_(), c.requires_grad_()
        result = total(x, c)
        assert result.requires_grad == differentiable
        got = torch.autograd.grad(result, (x, c)) if differentiable else (x * 0, c * 0)
    # d/dx 3 c x^2 = 6 c x, d/dc = 3 x^2.
    assert [g.item() for g in got] == ([60.0, 12.0] if differentiable else [0.0, 0.0])


def test_under_no_grad_it_still_differentiates_but_keeps_no_graph():
    with torch.no_grad():
        _, grads = derivatives.value_and_grad(
            cubic, {k: v.clone().requires_grad_() for k, v in POINT.items()}, differentiable=True
        )
    assert_close(grads, GRADS, 1e-15)
    assert not grads["x"].requires_grad


def test_a_weight_that_the_loss_does_not_read_has_gradient_zero():
    for differentiable in (False, True):
        _, grads = derivatives.value_and_grad(
            lambda p: p["x"].sum(), POINT, differentiable=differentiable
        )
        assert grads["y"].tolist() == [0.0]
    _, grads = derivatives.value_and_grad(
        lambda p: p["x"].detach().sum(), POINT, differentiable=True
    )
    assert not grads["x"].any()


def test_no_grad_is_left_behind_on_parameters():
    weight = torch.nn.Parameter(torch.ones(2))
    derivatives.value_and_grad(
        lambda p: (p["x"] * weight).sum(), {"x": torch.ones(2)}, differentiable=False
    )
    assert weight.grad is None


def test_a_loss_may_take_its_dict_apart():
    def loss(p):
        return p.pop("x").sum() + p.pop("y").sum()

    _, grads = derivatives.value_and_grad(loss, POINT, differentiable=False)
    assert grads["x"].tolist() == [1.0, 1.0]
    assert list(POINT) == ["x", "y"]


def test_inference_mode_is_refused():
    # Every gradient is silently zero there: the inner loop would return its start.
    with (
        torch.inference_mode(),
        pytest.raises(mf.errors.TransformError, match=r"torch\.no_grad\(\)"),
    ):
        derivatives.value_and_grad(cubic, POINT, differentiable=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, "inner_loss must return a scalar tensor, got float"),
        (torch.ones(2), r"inner_loss must return a scalar, got shape \[2\]. Reduce it: .mean()"),
        (torch.ones(1), r"got shape \[1\]"),
        (torch.tensor(1), r"must return a floating-point scalar, got torch.int64"),
    ],
)
def test_scalar_refuses(value, message):
    with pytest.raises(mf.errors.ProblemError, match=message):
        derivatives.scalar(value, "inner_loss")


@pytest.mark.parametrize("transform", [False, True])
def test_pullback_is_the_vector_jacobian_product(transform):
    def fn(a, n, b):
        return a * b.sum(), n + 1, b**2, a * 0 + 1

    a, n, b = torch.tensor([1.0, 2.0]), torch.arange(3), torch.tensor([3.0, 4.0])
    cot = (torch.tensor([1.0, 10.0]), None, None, None)

    def run(a, b):
        return derivatives.pullback(fn, (a, n, b), cot, (True, True, True))

    if transform:
        got = torch.func.vmap(lambda a, b: [g for g in run(a, b) if g is not None])(
            a[None], b[None]
        )
        got = [got[0][0], None, got[1][0]]
    else:
        got = run(a, b)
    assert got[0].tolist() == [7.0, 70.0]
    assert got[1] is None
    assert got[2].tolist() == [21.0, 21.0]


def test_pullback_gives_none_where_not_wanted():
    a, b = torch.ones(2), torch.ones(2)
    got = derivatives.pullback(lambda a, b: (a * b,), (a, b), (torch.ones(2),), (False, True))
    assert got[0] is None
    assert got[1].tolist() == [1.0, 1.0]
    nothing = derivatives.pullback(lambda a, b: (a * b,), (a, b), (None,), (True, True))
    assert nothing == [None, None]


def test_pullback_of_complex_inputs():
    z = torch.tensor([1 + 2j])
    (got,) = derivatives.pullback(lambda z: ((z * z.conj()).real,), (z,), (torch.ones(1),), (True,))
    # torch's convention: the conjugate Wirtinger derivative, twice.
    assert got.tolist() == [2 + 4j]


def test_replayed_draws_the_same_numbers_each_time_and_takes_none():
    noise = replayed(lambda n: torch.rand(n), ())
    before = torch.get_rng_state()
    first, second = noise(3), noise(3)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, torch.rand(3))


# --- which transforms are active ----------------------


def test_transforming_sees_each_transform():
    seen = {}

    def look(name):
        def f(x):
            seen[name] = torch_internals.transforming()
            return x.sum()

        return f

    x = torch.ones(2)
    torch.func.grad(look("grad"))(x)
    torch.func.vmap(look("vmap"))(x)
    torch.func.jvp(look("jvp"), (x,), (x,))
    torch.func.vjp(look("vjp"), x)
    look("none")(x)
    with torch.no_grad():
        look("no_grad")(x)
    assert seen == {
        "grad": True,
        "vmap": True,
        "jvp": True,
        "vjp": True,
        "none": False,
        "no_grad": False,
    }


def test_forward_levels_are_counted():
    one = torch.ones(())
    counts = []

    def f(x):
        counts.append(torch_internals.forward_levels())
        return x

    torch.func.jvp(f, (one,), (one,))
    torch.func.jvp(lambda x: torch.func.jvp(f, (x,), (one,))[1] + x, (one,), (one,))
    torch.func.jvp(torch.func.grad(f), (one,), (one,))
    torch.func.grad(f)(one)
    assert counts == [1, 2, 1, 0]


def test_is_tracked_at_each_level():
    one = torch.ones(())
    found = {}

    def note(name, value):
        found[name] = torch_internals.is_tracked(value)
        return value

    leaf = torch.ones((), requires_grad=True)
    note("tape", leaf * 2)
    note("constant", one * 2)
    note("detached", (leaf * 2).detach())
    torch.func.grad(lambda x: note("grad", x * 2))(one)
    torch.func.grad(lambda x: (note("grad detached", (x * 2).detach()), x)[1])(one)
    torch.func.vmap(lambda x: note("vmap", x * 2))(one[None])
    torch.func.vmap(lambda x: note("tape in vmap", x * leaf))(one[None])
    torch.func.grad(lambda x: torch.func.vmap(lambda y: note("grad in vmap", x * y))(one[None])[0])(
        one
    )
    torch.func.grad(lambda x: torch.func.grad(lambda y: (note("below", x * 2), y)[1])(one) + x)(one)
    torch.func.jvp(lambda x: note("jvp", x * 2), (one,), (one,))
    torch.func.jvp(lambda x: (note("jvp detached", x.detach()), x)[1], (one,), (one,))
    torch.func.jvp(
        lambda x: torch.func.grad(lambda y: (note("jvp below", x * 2), y)[1])(one) + x,
        (one,),
        (one,),
    )
    torch.func.jvp(
        lambda x: torch.func.vmap(lambda y: note("jvp in vmap", x * y))(one[None]), (one,), (one,)
    )
    with forward_ad.dual_level():
        note("dual", forward_ad.make_dual(one, one) * 2)
    assert found == {
        "tape": True,
        "constant": False,
        "detached": False,
        "grad": True,
        "grad detached": False,
        "vmap": False,
        "tape in vmap": True,
        "grad in vmap": True,
        "below": True,
        "jvp": True,
        "jvp detached": False,
        "jvp below": True,
        "jvp in vmap": True,
        "dual": True,
    }
