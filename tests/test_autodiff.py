"""Derivatives: first ones by two back ends, products with second ones, hypergradients once more."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from problems import (
    FAST,
    PULL,
    Ridge,
    assert_close,
    central_difference,
    flat,
    maml,
    regression,
)
from ways import SECOND, tape_grad

import metafocus as mf
from metafocus import torch_internals
from metafocus.autodiff import grad as derivatives
from metafocus.rng import replayed

pytestmark = pytest.mark.usefixtures("float64")


# --- first derivatives: the tape and torch.func agree ------------------------------------------
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


def test_scalar_refuses():
    for value, message in (
        (1.0, "inner_loss must return a scalar tensor, got float"),
        (torch.ones(2), r"inner_loss must return a scalar, got shape \[2\]. Reduce it: .mean()"),
        (torch.ones(1), r"got shape \[1\]"),
        (torch.tensor(1), r"must return a floating-point scalar, got torch.int64"),
    ):
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


# --- which transforms are active ---------------------------------------------------------------
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


# --- products with second derivatives against the dense matrices -------------------------------
PRODUCTS = {
    "reverse": (mf.hvp_reverse, 1e-13),
    "forward": (mf.hvp_forward, 1e-13),
    # u^(2/3) = 4e-11 relative to the third derivative and to |g|.
    "finite": (mf.hvp_finite(), 1e-8),
    # h^2 / 6 times the third derivative, at h = 1e-3; 1e-16 / 1e-3 of rounding.
    "finite(1e-3)": (mf.hvp_finite(1e-3), 1e-5),
}


def loss(fast, slow, xs):
    h = torch.tanh(xs[0] @ fast["w"] * slow["s"])
    return ((h + fast["b"]) ** 2).sum() + (fast["b"] ** 4).sum() * xs[1].sum()


def point():
    g = torch.Generator().manual_seed(1)

    def r(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    fast = {"w": r(3, 2), "b": r(2)}
    return fast, {"s": r(2), "unused": r(1)}, [r(4, 3), r(2)], {"w": r(3, 2), "b": r(2)}


def dense(fast, slow, xs, direction):
    """<grad_fast loss, direction> derived by every argument: the definition."""

    def along(fast, slow, xs):
        grads = torch.func.grad(loss)(fast, slow, xs)
        return sum((grads[k] * direction[k]).sum() for k in grads)

    return torch.func.grad(along, argnums=(0, 1, 2))(fast, slow, xs)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("transform", ["none", "vmap", "grad", "no_grad"])
def test_gradient_and_products(name, transform):
    hvp, tolerance = PRODUCTS[name]
    fast, slow, xs, direction = point()

    def run(fast, slow, xs):
        grads, product = hvp(loss, fast, slow, xs)
        # Twice the same and once half: a linear map that can be used again.
        return grads, product(direction), product({k: v / 2 for k, v in direction.items()})

    if transform == "vmap":
        stacked = torch.utils._pytree.tree_map(lambda x: x[None], (fast, slow, xs))
        result = torch.func.vmap(run)(*stacked)
        grads, full, half = torch.utils._pytree.tree_map(lambda x: x[0], result)
    elif transform == "grad":
        kept = []

        def outer(s):
            kept.extend(torch.utils._pytree.tree_map(lambda x: x.detach(), run(fast, slow, xs)))
            return s

        torch.func.grad(outer)(torch.ones(()))
        grads, full, half = kept
    elif transform == "no_grad":
        with torch.no_grad():
            grads, full, half = run(fast, slow, xs)
    else:
        grads, full, half = run(fast, slow, xs)
    want = dense(fast, slow, xs, direction)
    assert_close(grads, torch.func.grad(loss)(fast, slow, xs), 1e-14)
    assert_close(full[0], want[0], tolerance)
    assert_close(full[1]["s"], want[1]["s"], tolerance)
    assert_close(full[2], want[2], tolerance)
    assert not full[1]["unused"].any()
    assert_close(half[0], {k: v / 2 for k, v in want[0].items()}, tolerance)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_linear_loss_has_no_curvature(name):
    hvp, _ = PRODUCTS[name]
    fast = {"w": torch.ones(2)}
    grads, product = hvp(lambda f: (3 * f["w"]).sum(), fast)
    assert grads["w"].tolist() == [3.0, 3.0]
    assert not product({"w": torch.ones(2)})[0]["w"].any()


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_zero_direction_and_the_zero_point(name):
    hvp, tolerance = PRODUCTS[name]
    _, slow, xs, direction = point()
    zero = {k: torch.zeros_like(v) for k, v in direction.items()}
    _, product = hvp(loss, zero, slow, xs)
    assert all(not v.any() for v in product(zero)[0].values())
    want = dense(zero, slow, xs, direction)
    assert_close(product(direction)[0], want[0], tolerance)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("start", ["somewhere", "zero"])
def test_products_can_be_differentiated_again(name, start):
    hvp, tolerance = PRODUCTS[name]
    fast, slow, xs, direction = point()
    if start == "zero":
        fast = {k: torch.zeros_like(v) for k, v in fast.items()}

    names, sizes = list(fast), [v.numel() for v in fast.values()]
    at = torch.cat([slow["s"], *(v.reshape(-1) for v in fast.values())])

    def split(v):
        s, *parts = v.split([2, *sizes])
        moved = zip(names, parts, strict=True)
        return {k: p.reshape(fast[k].shape) for k, p in moved}, {**slow, "s": s}

    def total(v):
        f, s = split(v)
        _, product = hvp(loss, f, s, xs)
        moved, mixed, _ = product(direction)
        return (moved["w"] ** 2).sum() + mixed["s"].sum()

    def exact(v):
        f, s = split(v)
        moved, mixed, _ = dense(f, s, xs, direction)
        return (moved["w"] ** 2).sum() + mixed["s"].sum()

    want = torch.func.grad(exact)(at)
    got = torch.func.grad(total)(at)
    assert got.isfinite().all()
    # The derivative of a central difference is a central difference of derivatives.
    assert_close(got, want, tolerance * 100)
    leaf = at.clone().requires_grad_()
    (tape,) = torch.autograd.grad(total(leaf), leaf)
    assert_close(tape, want, tolerance * 100)


@pytest.mark.parametrize("name", ["reverse", "forward", "finite"])
def test_dropout_has_one_mask_for_the_gradient_and_all_products(name):
    hvp, tolerance = PRODUCTS[name]
    fast = {"w": torch.linspace(1, 2, 12)}

    def dropped(f):
        return (torch.nn.functional.dropout(f["w"] ** 3, 0.5)).sum()

    grads, product = hvp(dropped, fast)
    alive = grads["w"] != 0
    assert 0 < alive.sum() < 12
    ones = {"w": torch.ones(12)}
    # Dropout doubles what it keeps: 2 * 6 w where the gradient is alive.
    want = torch.where(alive, 12 * fast["w"], 0.0)
    for _ in range(2):
        assert_close(product(ones)[0]["w"], want, max(tolerance, 1e-8 if name == "finite" else 0))


def test_finite_needs_first_derivatives_only():
    def fused(f):
        q = f["w"].reshape(1, 1, 3, 2)
        return (torch.nn.functional.scaled_dot_product_attention(q, q, q) ** 2).sum()

    def plain(f):
        q = f["w"].reshape(1, 1, 3, 2)
        weights = (q @ q.mT / 2**0.5).softmax(-1)
        return ((weights @ q) ** 2).sum()

    fast, ones = {"w": torch.randn(6)}, {"w": torch.ones(6)}
    _, product = mf.hvp_finite()(fused, fast)
    _, exact = mf.hvp_reverse(plain, fast)
    # u^(2/3) = 4e-11 and the third derivative.
    assert_close(product(ones)[0], exact(ones)[0], 1e-8)
    with pytest.raises(RuntimeError, match="not implemented"):
        mf.hvp_reverse(fused, fast)[1](ones)


def test_finite_refuses_a_step_that_is_none():
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"eps must be positive, got {eps}"):
            mf.hvp_finite(eps)


def test_finite_says_its_step_and_compares():
    assert mf.hvp_finite(0.01) == mf.hvp_finite(0.01)
    assert mf.hvp_finite(0.01) != mf.hvp_finite()


def test_the_absolute_step_is_the_length_of_the_displacement():
    seen = []

    def loss(f):
        seen.append(f["w"].detach().clone())
        return (f["w"] ** 2).sum()

    start = torch.tensor([10.0, 0.0])
    _, product = mf.hvp_finite(0.25)(loss, {"w": start})
    seen.clear()
    product({"w": torch.tensor([3.0, 4.0])})
    for x in seen:
        # One square root and one division.
        assert abs((x - start).norm() - 0.25) < 1e-15


def test_forward_mode_takes_an_expanded_start():
    """A start whose elements lie in one place in memory: the same gradient as by reverse mode."""

    def loss(fast, slow, x):
        return ((fast["w"] * slow["w"]).sin() - x).square().sum()

    problem = mf.Problem(loss, loss, lambda slow, support: {"w": slow["w"][:1].expand(3)})
    outer = {"w": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
    episode = mf.Episode(torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    reverse, forward = (
        mf.hypergrad(
            mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=mf.Unrolled(hvp=product))
        )(outer, episode)[0]["w"]
        for product in (mf.hvp_reverse, mf.hvp_forward)
    )
    torch.testing.assert_close(forward, reverse, rtol=1e-13, atol=0)


# --- derivatives of hypergradients -------------------------------------------------------------

# A truncated hypergradient is the derivative of no function.
EXACT = [name for name in SECOND if name not in ("FirstOrder", "last=2")]


def _vector_problem(name):
    """The meta loss of the network as a function of one vector, for central differences."""
    case = maml()
    pull, solver = PULL, mf.SGD(0.05, 3, momentum=0.5)
    if name.startswith("Implicit"):
        # Converged, for only there does the implicit gradient have the derivative of itself.
        pull, solver = 20.0, mf.SGD(0.05, 150)
    problem = mf.Problem(mf.proximal(regression, pull), regression, case.problem.init)
    meta = mf.bilevel(problem, solver=solver, estimator=SECOND[name])
    names = list(FAST)
    sizes = [case.outer[k].numel() for k in names]

    def loss(vector):
        parts = vector.split(sizes)
        outer = {k: p.reshape(case.outer[k].shape) for k, p in zip(names, parts, strict=True)}
        return meta(outer, case.episode(0))[0]

    return loss, flat({k: case.outer[k] for k in names})


@pytest.mark.parametrize("name", EXACT)
def test_second_derivatives_are_those_of_the_first(name):
    loss, x = _vector_problem(name)
    direction = torch.randn_like(x)
    want = central_difference(tape_grad(loss), x, direction)

    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (tape,) = torch.autograd.grad(g @ direction, leaf)
    # Central differences of the first derivative: 1e-16 / 1e-5 of rounding, times the condition.
    # A first derivative that is itself a central difference is noisy at 1e-10, over 1e-5.
    limit = 1e-4 if name == "finite" else 1e-7
    assert_close(tape, want, limit)

    grad = torch.func.grad(loss)
    reverse = torch.func.grad(lambda v: grad(v) @ direction)(x)
    assert_close(reverse, want, limit)
    _, forward = torch.func.jvp(grad, (x,), (direction,))
    assert_close(forward, want, limit)
    transposed = torch.func.grad(lambda v: torch.func.jvp(loss, (v,), (direction,))[1])(x)
    assert_close(transposed, want, limit)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_second_derivative_of_first_order_holds_the_adaptation_constant(mode):
    loss, x = _vector_problem("FirstOrder")
    case = maml()
    solver = mf.SGD(0.05, 3, momentum=0.5)
    adapted = mf.adapt(case.problem, case.outer, case.episode(0).support, solver=solver).params
    sizes = [adapted[k].numel() for k in FAST]

    def query_loss(v):
        parts = zip(FAST, v.split(sizes), strict=True)
        return regression(
            {k: p.reshape(adapted[k].shape) for k, p in parts}, None, case.episode(0).query
        )

    direction = torch.randn_like(x)
    want = torch.func.hessian(query_loss)(flat(adapted)) @ direction
    if mode == "reverse":
        got = torch.func.grad(lambda v: torch.func.grad(loss)(v) @ direction)(x)
    else:
        got = torch.func.jvp(torch.func.grad(loss), (x,), (direction,))[1]
    # The same Hessian by another order of differentiation.
    assert_close(got, want, 1e-12)


def test_second_derivative_of_implicit_where_the_outer_gradient_is_zero():
    problem = mf.Problem(
        lambda fast, slow, x: ((fast["v"] - slow["w"]) ** 2).sum(),
        lambda fast, slow, x: ((fast["v"] - x) ** 2).sum(),
        lambda slow, support: {"v": torch.zeros(2)},
    )
    meta = mf.bilevel(problem, solver=mf.SGD(0.5, 2), estimator=mf.Implicit(mf.CG(3)))
    w = torch.tensor([1.0, 2.0])
    hessian = torch.func.hessian(lambda v: meta({"w": v}, (torch.zeros(2), w))[0])(w)
    # v* = w, so the meta loss is |w - x|^2.
    assert_close(hessian, 2 * torch.eye(2), 1e-12)


@pytest.mark.parametrize("name", SECOND)
def test_jvp_of_the_meta_loss_is_the_hypergradient_along_the_direction(name):
    loss, x = _vector_problem(name)
    direction = torch.randn_like(x)
    want = torch.func.grad(loss)(x) @ direction
    value, got = torch.func.jvp(loss, (x,), (direction,))
    # Forward mode is exact also where the pullback is a central difference (1e-9).
    assert abs(got - want) <= (1e-7 if name == "finite" else 1e-11) * abs(want)
    with torch.no_grad():
        assert torch.equal(value, loss(x))
    many = torch.stack([direction, -2 * direction])
    batched = torch.func.vmap(lambda d: torch.func.jvp(loss, (x,), (d,))[1])(many)
    assert_close(batched, torch.stack([got, -2 * got]), 1e-11)


@pytest.mark.parametrize("name", ["graph", "recompute", "Implicit(CG)"])
def test_hessian_of_the_meta_loss(name):
    loss, x = _vector_problem(name)
    hessian = torch.func.hessian(loss)(x)
    columns = torch.stack(
        [central_difference(tape_grad(loss), x, e) for e in torch.eye(len(x))], dim=1
    )
    # As in the test above.
    assert_close(hessian, columns, 1e-7)
    assert_close(hessian, hessian.T, 1e-9)


def test_second_derivatives_of_implicit_ridge_are_the_closed_form():
    ridge = Ridge()
    case = ridge.case()
    meta = mf.bilevel(
        case.problem,
        solver=mf.SGD(0.2, 150, momentum=0.5),
        estimator=mf.Implicit(mf.CG(4)),
    )
    x = case.outer["log_l2"]
    want = torch.func.jacrev(torch.func.jacrev(lambda v: ridge.meta(v, 0)))(x)

    def loss(v):
        return meta({"log_l2": v}, case.episode(0))[0]

    # Four unknowns, so CG(4) is exact up to rounding times the condition number.
    assert_close(torch.func.hessian(loss)(x), want, 1e-9)
    assert_close(torch.func.jacrev(torch.func.jacrev(loss))(x), want, 1e-9)
    leaf = x.clone().requires_grad_()
    grads, _ = mf.hypergrad(meta)({"log_l2": leaf}, case.episode(0))
    (row,) = torch.autograd.grad(grads["log_l2"][2], leaf)
    assert_close(row, want[2], 1e-9)


@pytest.mark.parametrize("steps", [4, 12, 40])
def test_second_derivatives_survive_more_cg_steps_than_unknowns(steps):
    # After convergence the residual is rounding noise, and CG divides noise by noise.
    ridge = Ridge()
    case = ridge.case()
    meta = mf.bilevel(
        case.problem,
        solver=mf.SGD(0.2, 150, momentum=0.5),
        estimator=mf.Implicit(mf.CG(steps)),
    )
    x = case.outer["log_l2"]
    want = torch.func.jacrev(torch.func.jacrev(lambda v: ridge.meta(v, 0)))(x)
    got = torch.func.hessian(lambda v: meta({"log_l2": v}, case.episode(0))[0])(x)
    assert_close(got, want, 1e-9)


@pytest.mark.parametrize("name", ["recompute", "recompute=2", "forward", "Implicit(CG)"])
def test_nested_forward_mode_is_refused(name):
    loss, x = _vector_problem(name)
    d = torch.ones_like(x)
    with pytest.raises(mf.errors.TransformError, match=r"two nested .*jacfwd\(jacrev\(f\)\)"):
        torch.func.jvp(lambda v: torch.func.jvp(loss, (v,), (d,))[1], (x,), (d,))
    with pytest.raises(mf.errors.TransformError, match="nested"):
        torch.func.jacfwd(torch.func.jacfwd(loss))(x)


@pytest.mark.parametrize("name", ["FirstOrder", "graph", "last=2"])
def test_nested_forward_mode_is_right_on_the_tape(name):
    loss, x = _vector_problem(name)
    d = torch.randn_like(x)
    _, got = torch.func.jvp(lambda v: torch.func.jvp(loss, (v,), (d,))[1], (x,), (d,))
    _, want = torch.func.jvp(torch.func.grad(loss), (x,), (d,))
    # The same number by two orders of differentiation.
    assert abs(got - want @ d) <= 1e-9 * abs(want @ d)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("scale", [1e-36, 1e-24, 1e24, 1e36])
def test_finite_differences_at_any_scale_of_the_direction(scale, eps):
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float32)
    _, product = mf.hvp_finite(eps)(lambda p: (p["x"] ** 2).sum(), {"x": x})
    got = product({"x": scale * x})[0]["x"]
    # u / h, with u = 6e-8 and h = 1e-3; the square of the direction alone is 1e-72 or 1e72.
    assert_close((got / scale).double(), 2 * x.double(), 1e-3)
    assert not product({"x": 0 * x})[0]["x"].any()
    assert product({"x": x * torch.nan})[0]["x"].isnan().all()


@pytest.mark.parametrize("size", [1e-3, 0.5, 1.0, 8.0])
def test_the_relative_step_is_never_shorter_than_that_of_weights_of_norm_one(size):
    """The step `u^(1/3) max(|fast|, 1)`: small weights do not make a step of nothing but noise."""
    seen = []

    def loss(f):
        seen.append(f["w"].detach().clone())
        return (f["w"] ** 2).sum()

    start = size * torch.tensor([0.6, 0.8])
    _, product = mf.hvp_finite()(loss, {"w": start})
    seen.clear()
    product({"w": torch.tensor([3.0, 4.0])})
    want = 2.0 ** (-52 / 3) * max(size, 1.0)
    assert len(seen) == 2
    for x in seen:
        # The difference of two weights is rounded as the weights are: u |fast| / want <= 4e-11.
        assert abs((x - start).norm() - want) < 1e-10 * want + 2.0**-52 * size


# --- differences in half types -------------------------------------------------------------------


def curved(fast, slow, x):
    return ((x @ fast["w"]).tanh() * slow["a"]).square().mean()


@pytest.mark.parametrize("way", ["plain", "vmap", "grad"])
@pytest.mark.parametrize("eps", [None, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_finite_difference_in_a_half_type_keeps_its_digits(dtype, eps, way):
    w, d, x = torch.linspace(-1, 1, 8), torch.linspace(1, 2, 8).sin(), torch.randn(20, 8)
    # The same numbers in every type.
    w, d, x = (v.to(torch.bfloat16 if dtype == torch.bfloat16 else dtype) for v in (w, d, x))
    a = torch.tensor(0.75)
    hvp = mf.hvp_finite(eps)

    def product(w):
        return hvp(curved, {"w": w}, {"a": a.to(dtype)}, x)[1]({"w": d})

    want = mf.hvp_reverse(curved, {"w": w.double()}, {"a": a.double()}, x.double())[1](
        {"w": d.double()}
    )
    if way == "plain":
        got = product(w)
    elif way == "vmap":
        got = torch.func.vmap(product)(w[None])
        got = {"w": got[0]["w"][0]}, {"a": got[1]["a"][0]}, got[2][0]
    else:
        got = torch.func.grad_and_value(lambda w: (product(w)[0]["w"].sum(), 0)[0])(w)
        assert got[0].dtype == dtype and got[0].isfinite().all()
        return
    pairs = ((got[0]["w"], want[0]["w"]), (got[1]["a"], want[1]["a"]), (got[2], want[2]))
    for found, exact in pairs:
        assert found.dtype == dtype
        # The result is rounded once; the rest is the third derivative at a step of 0.01.
        error = (found.double() - exact).norm() / exact.norm()
        assert error < torch.finfo(dtype).eps + 2e-3


@pytest.mark.filterwarnings("error")
def test_a_loss_that_needs_its_half_type_is_warned_of():
    weight = torch.eye(3, dtype=torch.bfloat16)
    fast, along = ({"w": torch.ones(3, dtype=torch.bfloat16)} for _ in range(2))

    def closed(f):
        return (weight @ f["w"]).square().sum()

    message = "hvp_finite: the fast weights are torch.bfloat16.*in outer.*float32, or use hvp_rev"
    with pytest.warns(mf.errors.PrecisionWarning, match=message):
        _, product = mf.hvp_finite()(closed, fast)
    assert product(along)[0]["w"].dtype == torch.bfloat16
    # Wide fast weights are not judged.
    mf.hvp_finite()(lambda f: (weight.double() @ f["w"]).square().sum(), {"w": torch.ones(3)})
