"""Operators are swapped where their derivatives would be wrong; a composite equals its operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close, central_difference, flat
from torch import nn
from torch.utils import _pytree as pytree

import metafocus as mf
from metafocus.autodiff.safe_operators import cross_entropy, swapping
from metafocus.autodiff.safe_operators.swapping import differentiable_once, differentiable_twice

pytestmark = pytest.mark.usefixtures("float64")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


Q, K, V = randn(2, 4, 5, 3, seed=1), randn(2, 4, 6, 3, seed=2), randn(2, 4, 6, 3, seed=3)
BOOL = torch.rand(5, 6, generator=torch.Generator().manual_seed(4)) > 0.4
BOOL[:, 0] = True
EMPTY_ROW = BOOL.clone()
EMPTY_ROW[2] = False
FLOAT = randn(2, 1, 5, 6, seed=5)
MINUS_INF = torch.zeros(5, 6).double().masked_fill(~EMPTY_ROW, -torch.inf)
X2, X3, X4 = randn(6, 3, seed=6), randn(4, 3, 5, seed=7), randn(3, 4, 3, 2, seed=8)
C3, C4 = randn(3, seed=9) + 2, randn(4, seed=10) + 2
Y = randn(6, 3, seed=11)
MEAN3, VAR3 = randn(3, seed=12), randn(3, seed=13).abs() + 0.5
TOKENS = torch.tensor([[2, 0, 5], [2, 2, 1]])
POSITIVE = randn(6, 3, seed=14).abs()

# --- each composite equals its operator, in every derivative -----------------------------------

# name: (composite, operator, function of it and of the differentiated inputs, inputs)
sdpa, attention = F.scaled_dot_product_attention, swapping.attention
TABLE = {
    "attention": (attention, sdpa, lambda f, q, k, v: f(q, k, v), (Q, K, V)),
    "attention 3-D": (attention, sdpa, lambda f, q, k, v: f(q[0], k[0], v[0]), (Q, K, V)),
    "attention bool": (attention, sdpa, lambda f, q, k, v: f(q, k, v, BOOL), (Q, K, V)),
    "attention float": (
        attention,
        sdpa,
        lambda f, q, k, v, m: f(q, k, v, attn_mask=m),
        (Q, K, V, FLOAT),
    ),
    "attention causal": (
        attention,
        sdpa,
        lambda f, q, k, v: f(q, k, v, is_causal=True),
        (Q, K, V),
    ),
    "attention scale": (attention, sdpa, lambda f, q, k, v: f(q, k, v, scale=0.3), (Q, K, V)),
    "attention gqa": (
        attention,
        sdpa,
        lambda f, q, k, v: f(q, k[:, :2], v[:, :2], BOOL, enable_gqa=True),
        (Q, K, V),
    ),
    "attention empty row": (attention, sdpa, lambda f, q, k, v: f(q, k, v, EMPTY_ROW), (Q, K, V)),
    "attention -inf row": (attention, sdpa, lambda f, q, k, v: f(q, k, v, MINUS_INF), (Q, K, V)),
    "batch_norm 2-D": (
        swapping.batch_norm,
        F.batch_norm,
        lambda f, x: f(x, None, None, training=True),
        (X2,),
    ),
    "batch_norm affine": (
        swapping.batch_norm,
        F.batch_norm,
        lambda f, x, w, b: f(x, None, None, w, b, True, 0.1, 1e-3),
        (X2, C3, C3 - 1),
    ),
    "batch_norm 4-D": (
        swapping.batch_norm,
        F.batch_norm,
        lambda f, x, w: f(x, None, None, w, None, True),
        (X4, C4),
    ),
    "batch_norm running": (
        swapping.batch_norm,
        F.batch_norm,
        lambda f, x, w, b: f(x, MEAN3, VAR3, w, b, False),
        (X2, C3, C3 + 1),
    ),
    "instance_norm 3-D": (
        swapping.instance_norm,
        F.instance_norm,
        lambda f, x: f(x),
        (X3,),
    ),
    "instance_norm affine": (
        swapping.instance_norm,
        F.instance_norm,
        lambda f, x, w, b: f(x, weight=w, bias=b, eps=1e-3),
        (X4, C4, C4 - 2),
    ),
    "instance_norm running": (
        swapping.instance_norm,
        F.instance_norm,
        lambda f, x: f(x, MEAN3, VAR3, use_input_stats=False),
        (X3,),
    ),
    "group_norm": (swapping.group_norm, F.group_norm, lambda f, x: f(x, 2), (X4,)),
    "group_norm affine": (
        swapping.group_norm,
        F.group_norm,
        lambda f, x, w, b: f(x, 3, w, b, eps=1e-3),
        (X3, C3, C3 - 1),
    ),
    "group_norm 2-D": (swapping.group_norm, F.group_norm, lambda f, x: f(x, 1), (X2,)),
    "layer_norm": (swapping.layer_norm, F.layer_norm, lambda f, x: f(x, (3,)), (X2,)),
    "layer_norm affine": (
        swapping.layer_norm,
        F.layer_norm,
        lambda f, x, w, b: f(x, (3, 2), w, b, eps=1e-3),
        (X4, X4[0, 0] + 2, X4[1, 0]),
    ),
    "embedding": (
        swapping.embedding,
        F.embedding,
        lambda f, w: f(TOKENS, w),
        (X2,),
    ),
    "embedding padded": (
        swapping.embedding,
        F.embedding,
        lambda f, w: f(TOKENS, w, padding_idx=-4),
        (X2,),
    ),
    "silu": (swapping.silu, F.silu, lambda f, x: f(x), (4 * X2,)),
    "mish": (swapping.mish, F.mish, lambda f, x: f(x), (4 * X2,)),
    "mish far out": (swapping.mish, F.mish, lambda f, x: f(x), (30 * X2,)),
    "silu far out": (swapping.silu, F.silu, lambda f, x: f(x), (300 * X2,)),
}
for _r in ("mean", "sum", "none"):
    TABLE[f"mse {_r}"] = (
        swapping.mse_loss,
        F.mse_loss,
        lambda f, x, y, r=_r: f(x, y, reduction=r),
        (X2, Y),
    )
    TABLE[f"mse weighted {_r}"] = (
        swapping.mse_loss,
        F.mse_loss,
        lambda f, x, y, r=_r: f(x, y, reduction=r, weight=POSITIVE),
        (X2, Y),
    )
    TABLE[f"huber {_r}"] = (
        swapping.huber_loss,
        F.huber_loss,
        lambda f, x, y, r=_r: f(x, y, reduction=r, delta=0.7),
        (X2, Y),
    )
    TABLE[f"huber weighted {_r}"] = (
        swapping.huber_loss,
        F.huber_loss,
        lambda f, x, y, r=_r: f(x, y, reduction=r, delta=0.7, weight=POSITIVE),
        (X2, Y),
    )
TABLE["huber at zero"] = (
    swapping.huber_loss,
    F.huber_loss,
    lambda f, x, y: f(x, y, delta=0.5),
    (X2, X2.clone()),
)
TABLE["weight_norm"] = (
    swapping.weight_norm,
    torch._weight_norm,
    lambda f, v, g: f(v, g, 0),
    (X3, POSITIVE[:4, :1, None] + 1),
)
TABLE["weight_norm of all"] = (
    swapping.weight_norm,
    torch._weight_norm,
    lambda f, v, g: f(v, g, -1),
    (X2, torch.tensor(1.7).double()),
)
NO_DOUBLE = [name for name in TABLE if name.startswith(("attention", "weight_norm"))]


def scalar_of(function, operator):
    """A scalar that depends on each output entry in its own, nonlinear way."""

    def f(*inputs):
        out = function(operator, *inputs)
        weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
        return (
            (torch.sin(out) * weights).sum() + (out**2 * weights.flip(0)).sum()
            if out.ndim
            else (out.sin() + out**2)
        )

    return f


def pair(name):
    composite, operator, function, inputs = TABLE[name]
    return scalar_of(function, composite), scalar_of(function, operator), inputs


@pytest.mark.parametrize("name", TABLE)
def test_values(name):
    composite, operator, function, inputs = TABLE[name]
    got, want = function(composite, *inputs), function(operator, *inputs)
    assert got.dtype == want.dtype and got.shape == want.shape
    # Another order of float64 operations.
    assert_close(got, want, 1e-13)


@pytest.mark.parametrize("name", TABLE)
def test_gradients(name):
    ours, theirs, inputs = pair(name)
    every = tuple(range(len(inputs)))
    got = torch.func.grad(ours, argnums=every)(*inputs)
    assert_close(got, torch.func.grad(theirs, argnums=every)(*inputs), 1e-11)


def _second(f, inputs, directions):
    """The gradient of <gradient, directions>, by reverse over reverse."""
    every = tuple(range(len(inputs)))

    def along(*xs):
        grads = torch.func.grad(f, argnums=every)(*xs)
        return sum((g * d).sum() for g, d in zip(grads, directions, strict=True))

    return torch.func.grad(along, argnums=every)(*inputs)


@pytest.mark.parametrize("name", TABLE)
def test_second_derivatives_in_both_modes(name):
    ours, theirs, inputs = pair(name)
    directions = tuple(randn(*x.shape, seed=i) for i, x in enumerate(inputs))
    every = tuple(range(len(inputs)))
    got = _second(ours, inputs, directions)
    forward = torch.func.jvp(torch.func.grad(ours, argnums=every), inputs, directions)[1]
    # Two orders of differentiation of one composite; normalisation cancels some digits.
    assert_close(forward, got, 1e-11)
    if name in NO_DOUBLE:
        sizes = [x.numel() for x in inputs]

        def gradient(v):
            xs = [p.reshape(x.shape) for p, x in zip(v.split(sizes), inputs, strict=True)]
            return flat(torch.func.grad(theirs, argnums=every)(*xs))

        want = central_difference(gradient, flat(inputs), flat(directions))
        # Central differences of the fused gradient: 1e-16 / 1e-5 and the third derivative.
        assert_close(flat(got), want, 1e-7)
    else:
        assert_close(got, _second(theirs, inputs, directions), 1e-11)


SMOOTH = [name for name in TABLE if not name.startswith("huber")]


@pytest.mark.parametrize("name", SMOOTH)
def test_third_derivatives(name):
    # torch's own are wrong for norms, see the next test.
    ours, _, inputs = pair(name)
    directions = tuple(randn(*x.shape, seed=i) / 5 for i, x in enumerate(inputs))

    def along(f):
        return lambda t: f(*(x + t * d for x, d in zip(inputs, directions, strict=True)))

    first = torch.func.grad(along(ours))
    second = torch.func.grad(first)
    zero = torch.tensor(0.0)
    got = torch.func.grad(second)(zero)
    want = central_difference(second, zero, torch.tensor(1.0), 1e-4)
    # h^2 = 1e-8 times the fifth derivative, 1e-16 / h of rounding.
    assert abs(got - want) <= 1e-5 * max(abs(want), 1)


WRONG = {
    "layer_norm": (F.layer_norm, lambda f, x: f(x, (3,)), 3),
    "batch_norm": (F.batch_norm, lambda f, x: f(x, None, None, training=True), 3),
    "instance_norm": (F.instance_norm, lambda f, x: f(x[None]), 3),
    "weight_norm": (torch._weight_norm, lambda f, x: f(x, POSITIVE[:, :1] + 1), 2),
}


@pytest.mark.parametrize("name", WRONG)
def test_torch_norms_are_wrong_in_high_order_and_ours_are_not(name):
    operator, call, order = WRONG[name]

    def bare(t):
        return (call(operator, X2 + t * Y).sin() * X2).sum()

    def derivative(f, k):
        for _ in range(k):
            f = torch.func.grad(f)
        return f

    def tape(f, k):
        t = torch.tensor(0.0, requires_grad=True)
        y = f(t)
        for _ in range(k):
            (y,) = torch.autograd.grad(y, t, create_graph=True)
        return y.detach()

    below = derivative(bare, order - 1)
    want = central_difference(below, torch.tensor(0.0), torch.tensor(1.0), 1e-4)
    if torch.__version__.startswith("2.13"):
        # If this fails, torch has been repaired: the composite can go.
        assert abs(tape(bare, order) - want) > 1e-3 * abs(want)
    ours = differentiable_twice(bare)
    for k, way in ((order, tape), (order, lambda f, k: derivative(f, k)(torch.tensor(0.0)))):
        # As above.
        assert abs(way(ours, k) - want) <= 1e-5 * abs(want)


@pytest.mark.parametrize("name", TABLE)
def test_under_vmap(name):
    ours, _, inputs = pair(name)
    many = tuple(torch.stack([x, 0.7 * x + 0.1]) for x in inputs)
    every = tuple(range(len(inputs)))
    directions = tuple(torch.ones_like(x) for x in inputs)
    grad = torch.func.grad(ours, argnums=every)

    def second(*xs):
        return torch.func.jvp(grad, xs, directions)[1]

    for f in (ours, grad, second):
        got = torch.func.vmap(f)(*many)
        want = [f(*(x[i] for x in many)) for i in range(2)]
        # The same operations, batched.
        assert_close(torch.utils._pytree.tree_map(lambda x: x[0], got), want[0], 1e-12)
        assert_close(torch.utils._pytree.tree_map(lambda x: x[1], got), want[1], 1e-12)


@pytest.mark.parametrize("mask", [EMPTY_ROW, MINUS_INF], ids=["bool", "-inf"])
def test_a_query_that_sees_nothing_gives_zeros_and_zero_gradient(mask):
    out = attention(Q, K, V, mask)
    assert not out[:, :, 2].any()
    assert out[:, :, 1].any()
    total = lambda q, k, v: attention(q, k, v, mask)[:, :, 2].sum()  # noqa: E731
    for g in torch.func.grad(total, argnums=(0, 1, 2))(Q, K, V):
        assert not g.any()
    second = torch.func.hessian(total)(Q[:1, :1], K[:1, :1], V[:1, :1])
    assert not second.any()


def test_attention_in_low_precision_computes_in_float32():
    q, k, v = (x.to(torch.bfloat16) for x in (Q, K, V))
    got = attention(q, k, v)
    assert got.dtype == torch.bfloat16
    want = attention(q.float(), k.float(), v.float())
    # One rounding to bfloat16, 2^-9.
    assert_close(got.float(), want, 2**-8)


def test_attention_refuses_a_mask_and_is_causal():
    with pytest.raises(ValueError, match="is_causal=True or attn_mask, not both"):
        attention(Q, K, V, BOOL, is_causal=True)


def test_attention_dropout_keeps_the_mean():
    torch.manual_seed(0)
    ones = torch.ones(1, 1, 1, 1)
    many = torch.stack([attention(ones, ones, ones, dropout_p=0.25) for _ in range(4000)])
    # 4000 draws of 0 or 4/3: standard error 0.009.
    assert abs(many.mean() - 1) < 0.04
    assert set(many.unique().tolist()) == {0.0, 4 / 3}


@pytest.mark.parametrize("which", ["batch", "instance"])
@pytest.mark.parametrize("x", [X2, X3, X4], ids=["2-D", "3-D", "4-D"])
def test_running_statistics_are_read_and_never_written(which, x):
    if which == "instance" and x.ndim == 2:
        pytest.skip("no spatial axes")
    composite = swapping.batch_norm if which == "batch" else swapping.instance_norm
    operator = F.batch_norm if which == "batch" else F.instance_norm
    mean, var = torch.linspace(0, 1, x.shape[1]), torch.linspace(1, 2, x.shape[1])
    for use_batch in (True, False):
        kept = mean.clone(), var.clone()
        leaf = x.clone().requires_grad_()
        got = composite(leaf, *kept, None, None, use_batch, 0.3)
        want = operator(leaf, mean.clone(), var.clone(), None, None, use_batch, 0.3)
        # Another order of sums.
        assert_close(got, want, 1e-13)
        assert torch.equal(kept[0], mean) and torch.equal(kept[1], var)


def test_deprecated_reductions_of_mse():
    for size_average in (None, True, False):
        for reduce in (None, True, False):
            with (
                pytest.warns(UserWarning)
                if (size_average, reduce) != (None, None)
                else (torch.no_grad())
            ):
                want = F.mse_loss(X2, Y, size_average=size_average, reduce=reduce)
                got = swapping.mse_loss(X2, Y, size_average=size_average, reduce=reduce)
            assert_close(got, want, 1e-15)


def test_layer_norm_in_low_precision_computes_in_float32():
    x = X2.to(torch.bfloat16)
    got = swapping.layer_norm(x, (3,), C3.to(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    want = F.layer_norm(x.float(), (3,), C3.to(torch.bfloat16).float())
    # One rounding to bfloat16.
    assert_close(got.float(), want, 2**-8)


def autocast_calls(device):
    """Operators of the tables with inputs in bfloat16, by name."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 6, 3, generator=g).bfloat16().to(device) for _ in range(2))
    m = x[:, :, 0].contiguous()
    signs = torch.where(y > 0, 1.0, -1.0).bfloat16()
    return {
        "layer_norm": (F.layer_norm, (x, (3,))),
        "group_norm": (F.group_norm, (x, 2)),
        "instance_norm": (F.instance_norm, (x,)),
        "batch_norm": (F.batch_norm, (x, None, None, None, None, True)),
        "mse_loss": (F.mse_loss, (x, y)),
        "huber_loss": (F.huber_loss, (x, y)),
        "soft_margin_loss": (F.soft_margin_loss, (x, signs)),
        "cdist": (torch.cdist, (m, m[:2])),
        "weight_norm": (torch._weight_norm, (m, m[:, :1])),
        "silu": (F.silu, (x,)),
        "mish": (F.mish, (x,)),
        "hardsigmoid": (F.hardsigmoid, (x,)),
    }


def check_autocast(name, device):
    """The composite has the type of the operator that it stands for, and its precision."""
    operator, inputs = autocast_calls(device)[name]
    tables = {**swapping._ALWAYS, **swapping._WRONG, **swapping._IN_FORWARD_MODE}
    with torch.autocast(device, torch.bfloat16):
        want, got = operator(*inputs), tables[operator](*inputs)
    assert got.dtype == want.dtype
    # Rounding once; distances are computed by way of a product or not, and torch's instance norm
    # rounds its statistics too.
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[got.dtype]
    bound = {"cdist": 1e-3, "instance_norm": 2**-5}.get(name, bound)
    assert (got.double() - want.double()).abs().max() <= bound * want.double().abs().max()


@pytest.mark.parametrize("name", autocast_calls("cpu"))
def test_autocast_takes_composites_where_it_takes_operators(name):
    check_autocast(name, "cpu")


# --- when operators are swapped ----------------------------------------------------------------


def _used(monkeypatch, table, function):
    used = []
    entries = getattr(swapping, table)
    original = entries[function]
    monkeypatch.setitem(entries, function, lambda *a, **k: (used.append(1), original(*a, **k))[1])
    return used


@pytest.mark.parametrize("function", [F.silu, F.mish])
def test_first_order_and_reverse_mode_keep_the_fused_kernels(monkeypatch, function):
    used = _used(monkeypatch, "_IN_FORWARD_MODE", function)
    loss = differentiable_twice(lambda x: function(x).sum())
    loss(X2)
    torch.func.grad(loss)(X2)
    torch.func.hessian(loss)(X2[0])
    assert len(used) > 0
    used.clear()
    torch.func.jacrev(torch.func.jacrev(loss))(X2[0])
    torch.func.vmap(torch.func.grad(loss))(X2)
    assert not used
    torch.func.jvp(loss, (X2,), (X2,))
    assert used


def test_outer_losses_swap_norms_in_transforms_only(monkeypatch):
    used = _used(monkeypatch, "_WRONG", F.layer_norm)

    def inner(fast, slow, x):
        return (fast["w"] ** 2).sum()

    def outer_loss(fast, slow, x):
        return F.layer_norm(x, (3,), fast["w"]).sin().sum() + F.silu(x).sum()

    problem = mf.Problem(inner, outer_loss, lambda slow, support: dict(slow))
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 1), estimator=mf.Unrolled())
    leaf = {"w": torch.ones(3).requires_grad_()}
    meta(leaf, (X2, X2))[0].backward()
    assert not used
    torch.func.grad(lambda o: meta(o, (X2, X2))[0])({"w": torch.ones(3)})
    assert used


def test_outside_the_block_nothing_is_swapped(monkeypatch):
    used = _used(monkeypatch, "_ALWAYS", F.scaled_dot_product_attention)
    assert not swapping.active()
    F.scaled_dot_product_attention(Q, K, V)
    assert not used
    with swapping.Swapped():
        assert swapping.active()
        F.scaled_dot_product_attention(Q, K, V)
    assert used == [1]
    assert not swapping.active()
    with pytest.raises(ZeroDivisionError):
        differentiable_twice(lambda: 1 // 0)()
    assert not swapping.active()


def test_first_order_estimators_keep_fused_attention(monkeypatch):
    used = _used(monkeypatch, "_ALWAYS", F.scaled_dot_product_attention)

    def loss(fast, slow, x):
        q = x * fast["w"]
        return (F.scaled_dot_product_attention(q, q, q) ** 2).mean()

    problem = mf.Problem(loss, loss, lambda slow, support: dict(slow))
    outer, episode = {"w": torch.ones(3)}, (Q, Q)
    mf.hypergrad(mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=mf.FirstOrder()))(
        outer, episode
    )
    mf.adapt(problem, outer, Q, solver=mf.SGD(0.1, 2))
    assert not used
    mf.hypergrad(mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=mf.Unrolled()))(
        outer, episode
    )
    assert used


# --- estimators through swapped operators ------------------------------------------------------

SECOND_ORDER = {
    "graph": mf.Unrolled(),
    "recompute": mf.Unrolled(recompute=True),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "Implicit": mf.Implicit(mf.CG(3)),
    "Implicit forward": mf.Implicit(mf.CG(3), mf.hvp_forward),
}


class Block(nn.Module):
    """Every operator of the table, and attention as torch.nn offers it."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.inner = nn.Linear(4, 4)
        self.mha = nn.MultiheadAttention(4, 2, batch_first=True)
        self.group = nn.GroupNorm(2, 4)

    def forward(self, x):
        if self.attention == "multi-head":
            h = self.mha(x, x, x, need_weights=False)[0]
        else:
            q = self.inner(x)
            h = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        h = F.silu(h) + F.mish(h)
        return self.group(h.transpose(1, 2)).transpose(1, 2)


@pytest.mark.filterwarnings(
    "ignore::metafocus.errors.NotStationaryWarning",
    # The outer loss keeps the fused kernel, which torch runs task by task.
    "ignore:There is a performance drop:UserWarning",
)
@pytest.mark.parametrize("way", ["backward", "func.grad", "grad(vmap)"])
@pytest.mark.parametrize("attention", ["sdpa", "multi-head"])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_fused_operators_work_in_inner_losses(name, attention, way):
    torch.manual_seed(0)
    module = Block(attention).double()
    x = randn(2, 2, 3, 4, seed=20)
    keep = [k for k, _ in module.named_parameters() if ("mha" in k) == (attention != "sdpa")]
    keep = [k for k in keep if attention != "sdpa" or "mha" not in k]
    outer = {k: v.detach() for k, v in module.named_parameters() if k in keep or "group" in k}

    def loss(fast, slow, x):
        y = torch.func.functional_call(module, fast, (x,))
        return (
            F.mse_loss(y, x)
            + F.huber_loss(y, 0 * x)
            + 0.1 * sum(((fast[k] - slow[k]) ** 2).sum() for k in fast)
        )

    problem = mf.Problem(loss, loss, lambda slow, support: dict(slow))
    for p in module.parameters():
        p.requires_grad_(False)
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=SECOND_ORDER[name])
    direction = {k: randn(*v.shape, seed=3) for k, v in outer.items()}
    if way == "backward":
        leaf = {k: v.clone().requires_grad_() for k, v in outer.items()}
        meta(leaf, (x[0], x[1]))[0].backward()
        got = {k: v.grad for k, v in leaf.items()}
    elif way == "func.grad":
        got = torch.func.grad(lambda o: meta(o, (x[0], x[1]))[0])(outer)
    else:
        pair = (torch.stack([x[0], x[0]]), torch.stack([x[1], x[1]]))
        got = torch.func.grad(lambda o: mf.over_tasks(meta)(o, pair)[0])(outer)
    along = sum((got[k] * direction[k]).sum() for k in got)
    if name.startswith("Implicit"):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            want = _implicit_by_hand(loss, problem, outer, x, mf.CG(3), direction)
        # The same CG in another arithmetic.
        assert abs(along - want) <= 1e-9 * abs(want)
        return

    def value(t):
        moved = {k: v + t * direction[k] for k, v in outer.items()}
        with torch.no_grad():
            return meta(moved, (x[0], x[1]))[0]

    want = central_difference(value, torch.tensor(0.0), torch.tensor(1.0))
    # See problems.central_difference; second differences of attention are of order 10.
    assert abs(along - want) <= 1e-7 * max(abs(want), 1)


def _implicit_by_hand(loss, problem, outer, x, solve, direction):
    fast = mf.adapt(problem, outer, x[0], solver=mf.SGD(0.1, 2)).params
    v, direct = torch.func.grad(loss, argnums=(0, 1))(fast, outer, x[1])

    def gradient(fast, slow):
        return torch.func.grad(loss)(fast, slow, x[0])

    adjoint = solve(lambda d: torch.func.vjp(lambda f: gradient(f, outer), fast)[1](d)[0], v)
    (mixed,) = torch.func.vjp(lambda s: gradient(fast, s), outer)[1](adjoint)
    return sum(((direct[k] - mixed[k]) * direction[k]).sum() for k in outer)


# --- torch's silent errors under vmap ----------------------------------------------------------

NORMS = {
    "batch_norm": lambda h, w, b: F.batch_norm(h, None, None, w, b, training=True),
    "instance_norm": lambda h, w, b: F.instance_norm(h, weight=w, bias=b),
    "layer_norm": lambda h, w, b: F.layer_norm(h.mT, (3,), w, b).mT,
    "torch.batch_norm": lambda h, w, b: torch.batch_norm(
        h, w, b, None, None, True, 0.1, 1e-5, False
    ),
    "torch.instance_norm": lambda h, w, b: torch.instance_norm(
        h, w, b, None, None, True, 0.1, 1e-5, False
    ),
    "torch.layer_norm": lambda h, w, b: torch.layer_norm(h.mT, (3,), w, b).mT,
    "nn.BatchNorm1d": lambda h, w, b: torch.func.functional_call(
        nn.BatchNorm1d(3, track_running_stats=False), {"weight": w, "bias": b}, (h,)
    ),
    "nn.LayerNorm": lambda h, w, b: (
        torch.func.functional_call(nn.LayerNorm(3), {"weight": w, "bias": b}, (h.mT,)).mT
    ),
}
PADDED = {
    "embedding": lambda i, w: F.embedding(i, w, padding_idx=1),
    "torch.embedding": lambda i, w: torch.embedding(w, i, 1),
    "nn.Embedding": lambda i, w: torch.func.functional_call(MODULE, {"weight": w}, (i,)),
}
MODULE = nn.Embedding(6, 4, padding_idx=1)


def _norm_net(name):
    """A convolution, a norm with weight and bias, a head: parameters, loss and two tasks."""
    params = {
        "conv": randn(3, 1, 2, seed=1),
        "weight": randn(3, seed=2) + 1,
        "bias": randn(3, seed=3),
        "head": randn(1, 9, seed=4) / 3,
    }

    def loss(fast, slow, data):
        h = NORMS[name](F.conv1d(data[0], fast["conv"]), fast["weight"], fast["bias"])
        return ((F.linear(torch.tanh(h).flatten(1), fast["head"]) - data[1]) ** 2).mean()

    support = (randn(2, 5, 1, 4, seed=5), randn(2, 5, 1, seed=6))
    query = (randn(2, 5, 1, 4, seed=7), randn(2, 5, 1, seed=8))
    return params, loss, mf.Episode(support, query), "conv"


def _padded_net(name):
    params = {"table": randn(6, 4, seed=1), "head": randn(4, 4, seed=2)}

    def loss(fast, slow, tokens):
        return (torch.tanh(PADDED[name](tokens, fast["table"])) @ fast["head"]).sin().pow(2).mean()

    g = torch.Generator().manual_seed(0)
    support, query = torch.randint(0, 6, (2, 2, 9), generator=g)
    return params, loss, mf.Episode(support, query), "table"


def _problem(name):
    return _padded_net(name) if name in PADDED else _norm_net(name)


def _task(episodes, i):
    return mf.Episode(*torch.utils._pytree.tree_map(lambda x: x[i], tuple(episodes)))


def _bare(loss, lr):
    def meta(params, support, query):
        grads = torch.func.grad(loss)(params, None, support)
        return loss({k: params[k] - lr * grads[k] for k in params}, None, query)

    return meta


@pytest.mark.parametrize("name", [*NORMS, *PADDED])
def test_the_torch_bug_under_vmap_is_not_ours(name):
    """grad(vmap(MAML)) through a norm is silently wrong in torch 2.13."""
    params, loss, episodes, below = _problem(name)
    bare = _bare(loss, 0.3)
    loop = [torch.func.grad(bare)(params, *_task(episodes, i)) for i in range(2)]
    want = {k: torch.stack([g[k] for g in loop]).mean(0) for k in params}
    wrong = torch.func.grad(
        lambda p: torch.func.vmap(bare, in_dims=(None, 0, 0))(p, *episodes).mean()
    )(params)
    if torch.__version__.startswith("2.13"):
        # If this fails, torch has been repaired: the composite can go.
        assert (wrong[below] - want[below]).norm() > 1e-3 * want[below].norm()

    problem = mf.Problem(loss, loss, lambda slow, support: dict(slow))
    for estimator_name, estimator in SECOND_ORDER.items():
        if estimator_name.startswith("Implicit"):
            continue
        meta = mf.over_tasks(mf.bilevel(problem, solver=mf.SGD(0.3, 1), estimator=estimator))
        got = torch.func.grad(lambda o, meta=meta: meta(o, episodes)[0])(params)
        # The loop of single tasks, batched; the composite in another order of operations.
        assert_close(got, want, 1e-11)
        leaf = {k: v.clone().requires_grad_() for k, v in params.items()}
        meta(leaf, episodes)[0].backward()
        assert_close({k: v.grad for k, v in leaf.items()}, want, 1e-11)


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("name", [*NORMS, *PADDED])
@pytest.mark.parametrize("estimator", [mf.FirstOrder(), mf.Implicit(mf.CG(2))], ids=str)
def test_first_order_and_implicit_through_them_under_vmap(name, estimator):
    params, loss, episodes, _ = _problem(name)
    problem = mf.Problem(mf.proximal(loss, 1.0), loss, lambda slow, support: dict(slow))
    meta = mf.bilevel(problem, solver=mf.SGD(0.3, 2), estimator=estimator)
    got = torch.func.grad(lambda o: mf.over_tasks(meta)(o, episodes)[0])(params)
    leaf = {k: v.clone().requires_grad_() for k, v in params.items()}
    mf.over_tasks(meta, how="loop")(leaf, episodes)[0].backward()
    assert_close(got, {k: v.grad for k, v in leaf.items()}, 1e-11)


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "embedding"])
def test_a_penalty_on_per_task_hypergradients(name):
    # grad(vmap(hypergrad)): the outer loss too has a gradient inside and one outside the vmap.
    params, loss, episodes, _ = _problem(name)
    problem = mf.Problem(loss, loss, lambda slow, support: dict(slow))
    one = mf.hypergrad(mf.bilevel(problem, solver=mf.SGD(0.3, 1), estimator=mf.Unrolled()))

    def size(grads):
        return sum((g**2).sum() for g in grads.values())

    def batched(p):
        return torch.func.vmap(lambda e: size(one(p, e)[0]))(episodes).sum()

    # Third derivatives: torch's own norms are wrong there also without vmap.
    bare = _bare(differentiable_twice(loss), 0.3)

    def loop(p):
        return sum(size(torch.func.grad(bare)(p, *_task(episodes, i))) for i in range(2))

    # The composite in another order of operations, third derivatives.
    assert_close(torch.func.grad(batched)(params), torch.func.grad(loop)(params), 1e-10)


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm"])
def test_second_derivative_of_a_meta_loss_through_norms(name):
    params, loss, episodes, _ = _norm_net(name)
    problem = mf.Problem(loss, loss, lambda slow, support: dict(slow))
    direction = {k: randn(*v.shape, seed=9) for k, v in params.items()}
    for estimator in (mf.Unrolled(), mf.Unrolled(recompute=True)):
        meta = mf.bilevel(problem, solver=mf.SGD(0.3, 2), estimator=estimator)

        def along(t, meta=meta):
            moved = {k: v + t * direction[k] for k, v in params.items()}
            return meta(moved, _task(episodes, 0))[0]

        first = torch.func.grad(along)
        want = central_difference(first, torch.tensor(0.0), torch.tensor(1.0))
        t = torch.tensor(0.0, requires_grad=True)
        (g,) = torch.autograd.grad(along(t), t, create_graph=True)
        (tape,) = torch.autograd.grad(g, t)
        # See problems.central_difference.
        assert abs(tape - want) <= 1e-6 * abs(want)
        assert abs(torch.func.grad(first)(torch.tensor(0.0)) - want) <= 1e-6 * abs(want)


def test_a_weight_normed_network_in_the_inner_loss():
    # torch's own second derivative of weight norm is wrong, so a naive loop is too.
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double()
    outer = {k: v.detach().clone() for k, v in module.named_parameters()}

    def loss(fast, slow, x):
        return torch.func.functional_call(module, fast, (x,)).sin().sum()

    for p in module.parameters():
        p.requires_grad_(False)
    problem = mf.Problem(loss, loss, lambda slow, support: dict(slow))
    direction = {k: randn(*v.shape, seed=9) for k, v in outer.items()}
    for estimator in SECOND_ORDER:
        if estimator.startswith("Implicit"):
            continue
        meta = mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=SECOND_ORDER[estimator])

        def along(t, meta=meta):
            moved = {k: v + t * direction[k] for k, v in outer.items()}
            with torch.no_grad():
                return meta(moved, (X2, Y))[0]

        got, _ = mf.hypergrad(meta)(outer, (X2, Y))
        want = central_difference(along, torch.tensor(0.0), torch.tensor(1.0))
        assert abs(sum((got[k] * direction[k]).sum() for k in got) - want) <= 1e-7 * abs(want)


def test_autocast_leaves_float64_alone():
    """As it does for the operators: a composite in half precision would lose 13 digits."""
    tables = {**swapping._ALWAYS, **swapping._WRONG, **swapping._IN_FORWARD_MODE}
    calls = autocast_calls("cpu")
    q, k, v = torch.randn(3, 1, 2, 5, 4).bfloat16()
    calls["attention"] = (F.scaled_dot_product_attention, (q, k, v))
    calls["cross_entropy"] = (F.cross_entropy, (q[0, 0], torch.tensor([0, 3, 1, 1, 2])))
    for name, (operator, inputs) in calls.items():
        inputs = pytree.tree_map_only(
            torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs
        )
        with torch.autocast("cpu", torch.bfloat16):
            want, got = operator(*inputs), tables[operator](*inputs)
        assert got.dtype == want.dtype == torch.float64, name
        # The same sums in another order, of a few dozen terms.
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(5, 3), (3,)])
def test_cross_entropy_has_the_defaults_of_torch(shape):
    """`F.cross_entropy` hands every argument over; a caller of the composite need not."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 2, -100, 1, 1])[: x.shape[0]] if x.ndim > 1 else torch.tensor(2)
    # The same sum in another order.
    torch.testing.assert_close(cross_entropy(x, y), F.cross_entropy(x, y), rtol=1e-12, atol=1e-12)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(x, y), x, create_graph=True)
    assert "NllLoss" not in names_of_graph(grad)


def names_of_graph(x):
    names, pending = [], [x.grad_fn]
    while pending:
        node = pending.pop()
        names.append(node.name())
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    return " ".join(names)


def test_a_loss_that_is_differentiated_once_keeps_fused_kernels():
    x, y = randn(5, 3).requires_grad_(), torch.tensor([0, 2, 0, 1, 1])
    graphs = [
        names_of_graph(evaluated(lambda x: F.cross_entropy(x, y))(x))
        for evaluated in (differentiable_once, differentiable_twice)
    ]
    assert ["NllLoss" in graph for graph in graphs] == [True, False]
