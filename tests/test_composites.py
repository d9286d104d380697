"""Every composite equals its operator, in every derivative."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close, central_difference, flat

from metafocus.autodiff.safe_operators import swapping
from metafocus.autodiff.safe_operators.swapping import differentiable_twice

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
def test_running_statistics_stay_as_they_were(which, x):
    if which == "instance" and x.ndim == 2:
        pytest.skip("no spatial axes")
    composite = swapping.batch_norm if which == "batch" else swapping.instance_norm
    operator = F.batch_norm if which == "batch" else F.instance_norm
    c = x.shape[1]
    results = []
    for f in (composite, operator):
        mean, var = torch.linspace(0, 1, c), torch.linspace(1, 2, c)
        leaf = x.clone().requires_grad_()
        results.append(f(leaf, mean, var, None, None, True, 0.3))
        moved = not torch.equal(mean, torch.linspace(0, 1, c))
        assert moved == (f is operator)
        assert torch.equal(var, torch.linspace(1, 2, c)) != moved
    # Another order of sums.
    assert_close(results[0], results[1], 1e-13)


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
