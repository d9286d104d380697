"""Three ways to multiply with second derivatives against the dense matrices."""

from __future__ import annotations

import pytest
import torch
from problems import assert_close

import metafocus as mf

pytestmark = pytest.mark.usefixtures("float64")

WAYS = {
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


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("transform", ["none", "vmap", "grad", "no_grad"])
def test_gradient_and_products(name, transform):
    hvp, tolerance = WAYS[name]
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


@pytest.mark.parametrize("name", WAYS)
def test_a_linear_loss_has_no_curvature(name):
    hvp, _ = WAYS[name]
    fast = {"w": torch.ones(2)}
    grads, product = hvp(lambda f: (3 * f["w"]).sum(), fast)
    assert grads["w"].tolist() == [3.0, 3.0]
    assert not product({"w": torch.ones(2)})[0]["w"].any()


@pytest.mark.parametrize("name", WAYS)
def test_the_zero_direction_and_the_zero_point(name):
    hvp, tolerance = WAYS[name]
    _, slow, xs, direction = point()
    zero = {k: torch.zeros_like(v) for k, v in direction.items()}
    _, product = hvp(loss, zero, slow, xs)
    assert all(not v.any() for v in product(zero)[0].values())
    want = dense(zero, slow, xs, direction)
    assert_close(product(direction)[0], want[0], tolerance)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("start", ["somewhere", "zero"])
def test_products_can_be_differentiated_again(name, start):
    hvp, tolerance = WAYS[name]
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
    hvp, tolerance = WAYS[name]
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


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_finite_refuses_a_step_that_is_none(eps):
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
