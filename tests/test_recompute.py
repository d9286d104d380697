"""recompute() is invisible: every derivative, every transform, every surrounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close

import metafocus as mf
from metafocus.autodiff.safe_operators.swapping import differentiable_twice

pytestmark = pytest.mark.usefixtures("float64")


def plain(x, w):
    return (torch.tanh(x @ w["a"]) * w["b"]).sin().sum() + (x**3).sum() / 3


def remade(x, w):
    return mf.recompute(plain, x, w)


def nested(x, w):
    return mf.recompute(lambda x, w: mf.recompute(plain, x, w) + 0 * x.sum(), x, w)


X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
W = {
    "a": torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4),
    "b": torch.linspace(0.5, 2, 4, dtype=torch.float64),
}
D = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def grad(f):
    return torch.func.grad(f)


def along(f, d=D):
    return lambda x, w: torch.func.jvp(lambda x: f(x, w), (x,), (d,))[1]


def dotted(f):
    return lambda x, w: f(x, w) @ D


TRANSFORMS = {
    "value": lambda f: f,
    "grad": grad,
    "grad by w": lambda f: torch.func.grad(f, argnums=1),
    "grad^2": lambda f: grad(dotted(grad(f))),
    "grad^3": lambda f: grad(dotted(grad(dotted(grad(f))))),
    "jvp": along,
    "jvp(grad)": lambda f: along(grad(f)),
    "grad(jvp)": lambda f: grad(along(f)),
    "jvp(grad^2)": lambda f: along(grad(dotted(grad(f)))),
    "grad(jvp(grad))": lambda f: grad(dotted(along(grad(f)))),
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "jacrev(jacfwd)": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "jacrev(jacrev)": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
}


@pytest.mark.parametrize("batch", ["one", "vmap", "vmap(vmap)", "vmap over w"])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("version", [remade, nested], ids=["recompute", "nested"])
def test_every_transform_equals_the_plain_function(version, name, batch):
    def run(f):
        derived = TRANSFORMS[name](f)
        if batch == "one":
            return derived(X, W)
        if batch == "vmap over w":
            many = {k: torch.stack([v, 2 * v]) for k, v in W.items()}
            return torch.func.vmap(derived, in_dims=(None, 0))(X, many)
        xs = torch.stack([X, -X, 0.5 * X])
        mapped = torch.func.vmap(derived, in_dims=(0, None))
        if batch == "vmap":
            return mapped(xs, W)
        return torch.func.vmap(mapped, in_dims=(0, None))(torch.stack([xs, 2 * xs]), W)

    # The same operations, differentiated in another order; third derivatives cancel more.
    assert_close(run(version), run(plain), 1e-11)


@pytest.mark.parametrize("name", ["grad", "grad^2", "jvp", "jvp(grad)", "grad(jvp)"])
def test_grad_and_jvp_around_vmap(name):
    def batched(f):
        return lambda x, w: torch.func.vmap(f, in_dims=(0, None))(torch.stack([x, 2 * x]), w).sum()

    got = TRANSFORMS[name](batched(remade))(X, W)
    assert_close(got, TRANSFORMS[name](batched(plain))(X, W), 1e-12)


@pytest.mark.parametrize("version", [remade, nested])
def test_the_tape_to_third_order(version):
    def thrice(f):
        x = X.clone().requires_grad_()
        w = {k: v.clone().requires_grad_() for k, v in W.items()}
        (g,) = torch.autograd.grad(f(x, w), x, create_graph=True)
        (h,) = torch.autograd.grad(g @ D, x, create_graph=True)
        (h @ D).backward()
        return g, h, x.grad, w["a"].grad, w["b"].grad

    assert_close(thrice(version), thrice(plain), 1e-11)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_backward_with_create_graph_fills_grads_that_can_be_derived():
    x = X.clone().requires_grad_()
    remade(x, W).backward(create_graph=True)
    (got,) = torch.autograd.grad(x.grad @ D, x)
    assert_close(got, TRANSFORMS["grad^2"](plain)(X, W), 1e-12)
    x.grad = None  # a gradient with a graph refers to itself


def test_gradcheck():
    w = [v.clone().requires_grad_() for v in W.values()]

    def f(x, a, b):
        return remade(x, {"a": a, "b": b})

    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(f, (x, *w), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (x, *w), check_fwd_over_rev=True)


def test_tape_around_functorch_and_back():
    w = {k: v.clone().requires_grad_() for k, v in W.items()}

    def run(f):
        for v in w.values():
            v.grad = None
        torch.func.vmap(torch.func.grad(f), in_dims=(0, None))(
            torch.stack([X, -X]), w
        ).sin().sum().backward()
        return [v.grad.clone() for v in w.values()]

    assert_close(run(remade), run(plain), 1e-12)


def test_nested_forward_mode_is_refused():
    with pytest.raises(
        mf.errors.TransformError, match=r"recompute inside two nested .* Use jacfwd"
    ):
        along(along(remade))(X, W)
    with pytest.raises(mf.errors.TransformError, match="nested"):
        torch.func.jacfwd(torch.func.jacfwd(remade))(X, W)


# --- odd inputs and outputs -----------------------------------------


def test_integers_strings_and_none_pass_through():
    def f(data, n, name, nothing):
        assert nothing is None and name == "mean"
        x, index = data["x"], data["index"]
        return {"y": (x[index] ** n).mean(), "index": index + 1, "same": x}

    data = {"x": X, "index": torch.tensor([0, 2])}
    out = mf.recompute(f, data, 2, "mean", None)
    assert list(out) == ["y", "index", "same"]
    assert out["index"].tolist() == [1, 3]
    assert torch.equal(out["same"], X)

    def loss(x):
        out = mf.recompute(f, {**data, "x": x}, 2, "mean", None)
        return out["y"] + out["same"][1]

    want = torch.tensor([X[0], 1.0, X[2]])
    x = X.clone().requires_grad_()
    loss(x).backward()
    # Exact: one product.
    assert torch.equal(x.grad, want)
    assert torch.equal(torch.func.grad(loss)(X), want)
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(X[None])[0], want)
    assert torch.func.jvp(loss, (X,), (D,))[1] == want @ D
    assert torch.equal(torch.func.hessian(loss)(X), torch.diag(torch.tensor([1.0, 0.0, 1.0])))


def test_outputs_that_are_inputs_views_or_twice_the_same():
    def f(x):
        y = x**2
        return x, x.view(-1), y, y, x.detach()

    def loss(x):
        same, view, y, again, constant = mf.recompute(f, x)
        return (same * view).sum() + (y * again).sum() + (constant * x).sum()

    def direct(x):
        return (x * x).sum() + (x**4).sum() + (x.detach() * x).sum()

    for derive in (torch.func.grad, torch.func.hessian):
        assert_close(derive(loss)(X), derive(direct)(X), 1e-14)
    x = X.clone().requires_grad_()
    loss(x).backward()
    assert_close(x.grad, torch.func.grad(direct)(X), 1e-14)
    assert torch.func.vmap(torch.func.grad(loss))(torch.stack([X, X])).shape == (2, 3)


def test_unused_outputs_and_unused_inputs():
    def loss(x, y):
        first, _ = mf.recompute(lambda x, y: ((x**2).sum(), (y**3).sum()), x, y)
        return first

    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    loss(x, y).backward()
    assert torch.equal(x.grad, 2 * X)
    assert y.grad is None or not y.grad.any()
    assert not torch.func.grad(loss, argnums=1)(X, X).any()


def test_inputs_that_need_no_gradient_get_none():
    calls = []

    def f(x, c):
        calls.append(1)
        return (x * c).sum()

    x = X.clone().requires_grad_()
    mf.recompute(f, x, D).backward()
    assert torch.equal(x.grad, D)
    # Once forward, once backward.
    assert len(calls) == 2
    mf.recompute(f, X, D)
    assert len(calls) == 3


def test_complex_inputs():
    z = torch.tensor([1 + 2j], requires_grad=True)
    mf.recompute(lambda z: (z * z.conj()).real.sum(), z).backward()
    assert z.grad.tolist() == [2 + 4j]


def test_no_tensor_at_all():
    assert mf.recompute(lambda n: torch.ones(n), 3).tolist() == [1.0, 1.0, 1.0]


def test_an_error_in_the_function_comes_through():
    with pytest.raises(ZeroDivisionError):
        mf.recompute(lambda x: x / (1 // 0), X)


def test_an_own_pullback_is_used():
    def pullback(args, cotangents):
        (x, n), c = args, cotangents
        return 100 * n * c * x, None

    x = X.clone().requires_grad_()
    mf.recompute(lambda x, n: (x**2).sum(), x, 3, pullback=pullback).backward()
    assert torch.equal(x.grad, 300 * X)
    got = torch.func.grad(
        lambda x: mf.recompute(lambda x, n: (x**2).sum(), x, 3, pullback=pullback)
    )(X)
    assert torch.equal(got, 300 * X)


# --- surroundings -----------------------------------------


@pytest.mark.parametrize("way", ["backward", "func.grad", "create_graph", "jvp"])
def test_dropout_is_replayed(way):
    def noisy(x):
        return (F.dropout(x, 0.5) ** 2 * torch.rand_like(x)).sum() + F.dropout(x, 0.3).sum()

    x = torch.linspace(1, 2, 40)

    def run(f):
        torch.manual_seed(3)
        if way == "func.grad":
            out = torch.func.grad(f)(x)
        elif way == "jvp":
            out = torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]
        else:
            leaf = x.clone().requires_grad_()
            (out,) = torch.autograd.grad(f(leaf), leaf, create_graph=way == "create_graph")
            if way == "create_graph":
                (out,) = torch.autograd.grad(out.sum(), leaf)
        return out.detach(), torch.get_rng_state()

    (want, state), (got, same) = run(noisy), run(lambda x: mf.recompute(noisy, x))
    assert_close(got, want, 1e-14)
    # Derivatives draw nothing: the generator stands where a forward pass leaves it.
    assert torch.equal(state, same)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap_is_replayed(randomness):
    xs = torch.ones(4, 20)

    def f(x):
        return (mf.recompute(lambda x: F.dropout(x, 0.5), x) * torch.arange(1.0, 21.0)).sum()

    torch.manual_seed(0)
    values, masks = torch.func.vmap(
        lambda x: tuple(reversed(torch.func.grad_and_value(f)(x))), randomness=randomness
    )(xs)
    # The function is linear, so the gradient dotted with the ones is the value.
    assert_close(masks.sum(1), values, 1e-14)
    rows = {tuple(row.tolist()) for row in masks}
    assert len(rows) == (1 if randomness == "same" else 4)


def _autocast_step(remake):
    """Two uses of one weight under autocast; the second is a plain forward pass."""
    torch.manual_seed(0)
    w = torch.randn(8, 8, dtype=torch.float32, requires_grad=True)
    x = torch.randn(4, 8, dtype=torch.float32)

    def layer(x, w):
        return torch.tanh(F.linear(x, w))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = mf.recompute(layer, x, w) if remake else layer(x, w)
        assert h.dtype == torch.bfloat16
        h = F.linear(h, w)
    h.float().pow(2).sum().backward()
    return w.grad


def test_autocast_does_not_leave_a_cast_without_a_graph_in_its_cache():
    got, want = _autocast_step(True), _autocast_step(False)
    # With the trap, the second use gives no gradient at all: an error near 1 (torch 2.13 itself
    # no longer hands such a cast out, older ones do). Without it both round at the same places,
    # but the cache adds the two gradients in bfloat16: 2^-8.
    assert_close(got, want, 2**-8)


def test_the_derivative_runs_in_the_precision_of_the_forward_pass():
    w = torch.randn(8, 8, dtype=torch.float32)
    x = torch.randn(4, 8, dtype=torch.float32)
    seen = []

    def layer(x, w):
        y = x @ w
        seen.append(y.dtype)
        return y.float().sum()

    leaf = w.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mf.recompute(layer, x, leaf)
    y.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.func.grad(lambda w: mf.recompute(layer, x, w))(w)
    assert seen == [torch.bfloat16] * 4
    seen.clear()
    y = mf.recompute(layer, x, leaf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward()
    assert seen == [torch.float32] * 2


def test_swapped_operators_are_swapped_again():
    def attend(q):
        return F.scaled_dot_product_attention(q, q, q).pow(2).sum()

    q = torch.randn(1, 1, 3, 2)
    loss = differentiable_twice(lambda q: mf.recompute(attend, q))
    leaf = q.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), leaf)

    def by_hand(q):
        return ((q @ q.mT / 2**0.5).softmax(-1) @ q).pow(2).sum()

    want = torch.func.jvp(torch.func.grad(by_hand), (q,), (torch.ones_like(q),))[1]
    assert_close(h, want, 1e-12)


# --- memory -----------------------------------------


def _saved_bytes(f, x):
    total = 0
    seen = set()

    def pack(t):
        nonlocal total
        key = t.untyped_storage().data_ptr()
        if key not in seen:
            seen.add(key)
            total += t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f(x)
    return total, y


def test_only_the_inputs_are_saved():
    def deep(x):
        for _ in range(20):
            x = torch.tanh(x) * torch.sigmoid(x)
        return x.sum()

    x = torch.randn(1000, requires_grad=True)
    size = x.untyped_storage().nbytes()
    graph, y = _saved_bytes(deep, x)
    remade, z = _saved_bytes(lambda x: mf.recompute(deep, x), x)
    # Twenty layers save three tensors each; recompute saves x, which is alive anyway.
    assert graph >= 40 * size
    assert remade == size
    (a,), (b,) = torch.autograd.grad(y, x), torch.autograd.grad(z, x)
    assert torch.equal(a, b)
