"""Attention over spans: every back end against the dense oracle, to the second order."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from hypothesis import strategies as st
from models import chat_batch, relative
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.overrides import TorchFunctionMode

import metafocus as mf
from metafocus.attention import span_attention
from metafocus.attention.kernels import tiles
from metafocus.errors import ProblemError, TransformError
from metafocus.masks.spans import Spans, nonempty, windowed

B, H, HKV, S, D, DV = 2, 4, 2, 11, 5, 3
# Sums of some hundred products in another order.
EXACT = 1e-12
ARGS = (0, 1, 2)
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.3},
    "sinks": {"sinks": torch.randn(H, dtype=torch.float64, generator=torch.Generator())},
    "both": {
        "softcap": 0.7,
        "sinks": torch.randn(H, dtype=torch.float64, generator=torch.Generator()),
    },
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(params=(40, 10**6), ids=("many-tiles", "one-tile"))
def capacity(request, monkeypatch):
    monkeypatch.setattr(tiles, "CAPACITY", request.param)
    monkeypatch.setattr(tiles, "SMALLEST", 2)


def inputs(seed=0, length=S, dtype=torch.float64, width=DV, heads=(H, HKV)):
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads[0], D), (heads[1], D), (heads[1], width))
    return tuple(
        torch.randn(B, h, length, d, generator=g, dtype=torch.float64).to(dtype) for h, d in shapes
    )


def random_spans(seed=0, length=S, rows=B):
    """Intervals anywhere, some empty."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(0, length, (rows, length), generator=g)
    stop = start + torch.randint(0, length, (rows, length), generator=g)
    return nonempty(start, stop.clamp(max=length))


def policies(length=72):
    """What mask policies give, with padding, packing and windows."""
    batch = chat_batch(length)
    packed = {**batch, "document_ids": (torch.arange(length) >= length // 2).long().expand(2, -1)}
    block = mf.masks.context_bidirectional(batch)
    return {
        "causal": mf.masks.causal(batch),
        "prefix": mf.masks.prefix_lm(batch),
        "runs": block,
        "full": mf.masks.full(batch),
        "window": mf.masks.sliding_window(7)(batch),
        "packed": mf.masks.causal({k: packed[k] for k in ("input_ids", "document_ids")}),
        "narrow": windowed(block, 5),
        "random": random_spans(3, length),
    }


def loss(spans, backend, **options):
    """A scalar whose second derivatives are not symmetric in anything."""

    def of(q, k, v):
        out = span_attention(q, k, v, spans, backend=backend, **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return (torch.sin(2 * out) * weights).sum()

    return of


def error(got, expected):
    flat = [torch.cat([x.flatten() for x in xs]) for xs in (got, expected)]
    return relative(*flat)


def second(f):
    return grad(lambda *a: sum((g * g.sin()).sum() for g in grad(f, ARGS)(*a)), ARGS)


@options
@pytest.mark.usefixtures("capacity")
def test_tiled_is_dense_in_every_order(options):
    args, way, spans = inputs(), inputs(1), random_spans()
    tiled, dense = (loss(spans, backend, **options) for backend in ("tiled", "dense"))
    assert error([tiled(*args)], [dense(*args)]) < EXACT
    assert error(grad(tiled, ARGS)(*args), grad(dense, ARGS)(*args)) < EXACT
    assert error(second(tiled)(*args), second(dense)(*args)) < EXACT
    assert error([jvp(tiled, args, way)[1]], [jvp(dense, args, way)[1]]) < EXACT

    def ahead(f):
        return jvp(grad(f, ARGS), args, way)[1]

    def behind(f):
        return grad(lambda *a: jvp(f, a, way)[1], ARGS)(*args)

    assert error(ahead(tiled), ahead(dense)) < EXACT
    assert error(behind(tiled), behind(dense)) < EXACT


@pytest.mark.parametrize("options", ({}, OPTIONS["both"]), ids=("plain", "both"))
def test_whole_hessians(options):
    """Every order of forward and reverse mode, under the vmap that jacobians are."""
    args, spans = inputs(), random_spans()
    tiled, dense = (loss(spans, backend, **options) for backend in ("tiled", "dense"))
    q = args[0]
    for outside, inside in ((jacfwd, jacrev), (jacrev, jacrev)):
        got, expected = (outside(inside(lambda x, f=f: f(x, *args[1:])))(q) for f in (tiled, dense))
        assert error([got], [expected]) < EXACT


@pytest.mark.usefixtures("capacity")
@pytest.mark.parametrize("backend", ("tiled", "flash"))
def test_vmap(backend):
    """Over inputs and spans, of a second derivative; and a gradient of a vmap."""
    spans = [mf.masks.causal(chat_batch(S + 13, seed)) for seed in range(3)]
    many = [
        torch.stack(x) for x in zip(*(inputs(s, S + 13, width=D) for s in range(3)), strict=True)
    ]
    starts, stops = (torch.stack(x) for x in zip(*spans, strict=True))

    def one(q, k, v, start, stop):
        return second(loss(Spans(start, stop), backend))(q, k, v)

    got = vmap(one)(*many, starts, stops)
    for i, own in enumerate(spans):
        expected = second(loss(own, "dense"))(*(x[i] for x in many))
        assert error([x[i] for x in got], expected) < EXACT
    # Keys of every task, one query for all: an axis that is not mapped.
    got = vmap(one, (None, 0, 0, None, None))(many[0][0], *many[1:], starts[0], stops[0])
    expected = second(loss(spans[0], "dense"))(many[0][0], many[1][2], many[2][2])
    assert error([x[2] for x in got], expected) < EXACT

    def total(backend):
        def mean(q, k, v):
            each = vmap(
                lambda *a: sum((g * g).sum() for g in grad(loss(spans[0], backend), ARGS)(*a))
            )
            return each(q, k, v).mean()

        return grad(mean, ARGS)(*many)

    assert error(total(backend), total("dense")) < EXACT


@pytest.mark.parametrize("backend", ("auto", "tiled", "flash"))
@pytest.mark.parametrize("policy", [p for p in policies() if p != "random"])
def test_policies(backend, policy):
    """Every policy, through the tape: value, gradient, second derivative."""
    spans = policies()[policy]
    args = [x.requires_grad_() for x in inputs(0, 72, width=D)]

    def derivatives(backend):
        value = loss(spans, backend)(*args)
        first = torch.autograd.grad(value, args, create_graph=True)
        return [value], first, torch.autograd.grad(sum((g * g.sin()).sum() for g in first), args)

    for got, expected in zip(derivatives(backend), derivatives("dense"), strict=True):
        assert error(got, expected) < EXACT


def tiny(rows=1, heads=(2, 1), length=6, width=2):
    """Few enough numbers for central differences in each of them."""
    g = torch.Generator().manual_seed(2)
    shapes = [(rows, h, length, width) for h in (heads[0], heads[1], heads[1])]
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("options", ({}, {"softcap": 1.3}), ids=("plain", "softcap"))
def test_gradcheck(options, monkeypatch):
    monkeypatch.setattr(tiles, "CAPACITY", 20)
    monkeypatch.setattr(tiles, "SMALLEST", 2)
    spans = random_spans(5, 6, rows=1)

    def attend(*args):
        return span_attention(*args, spans, backend="tiled", **options)

    assert torch.autograd.gradcheck(attend, tiny(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, tiny(), check_fwd_over_rev=True)


def test_sinks_get_their_gradients():
    q, k, v = tiny()
    spans = random_spans(5, 6, rows=1)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def attend(sinks, q):
        return span_attention(q, k, v, spans, backend="tiled", sinks=sinks)

    assert torch.autograd.gradcheck(attend, (sinks, q), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, (sinks, q), check_fwd_over_rev=True)
    # The definition: one more key, with that logit and no value.
    z = q[0, 1] @ k[0, 0].T / 2**0.5
    weights = torch.exp(z.masked_fill(~spans.dense()[0, 0], -torch.inf))
    expected = weights @ v[0, 0] / (weights.sum(-1, keepdim=True) + sinks[1].exp())
    assert relative(attend(sinks, q)[0, 1], expected) < EXACT


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=9, max_size=9),
    st.integers(2, 60),
)
def test_any_spans(intervals, capacity):
    """Whatever the intervals, empty ones included, in whatever tiles."""
    start, stop = torch.tensor(intervals).T
    spans = nonempty(start[None].expand(B, -1), stop[None].expand(B, -1))
    args = inputs(4, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CAPACITY", capacity)
        patch.setattr(tiles, "SMALLEST", 1)
        got = grad(loss(spans, "tiled"), ARGS)(*args)
        again = second(loss(spans, "tiled"))(*args)
    assert torch.allclose(
        torch.cat([g.flatten() for g in got]),
        torch.cat([g.flatten() for g in grad(loss(spans, "dense"), ARGS)(*args)]),
        atol=EXACT,
    )
    expected = second(loss(spans, "dense"))(*args)
    assert all(torch.allclose(a, b, atol=EXACT) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("backend", ("auto", "dense", "tiled", "flash"))
def test_queries_without_keys(backend):
    """Zeros out, zero gradients, of both orders, and never NaN."""
    length = 70
    empty = torch.arange(length) % 3 == 0
    stop = torch.where(empty, 0, torch.arange(1, length + 1)).repeat(B, 1)
    spans = Spans(torch.zeros_like(stop), stop)
    args = [x.requires_grad_() for x in inputs(0, length, width=D)]
    out = span_attention(*args, spans, backend=backend)
    assert (out[:, :, empty] == 0).all() and (out[:, :, ~empty] != 0).all()
    first = torch.autograd.grad(out.square().sum(), args, create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in first), args)
    for grads in (first, again):
        assert (grads[0][:, :, empty] == 0).all()
        assert all(g.isfinite().all() for g in grads)
    nothing = Spans(*(torch.zeros(B, length).long() for _ in range(2)))
    out = span_attention(*args, nothing, backend=backend)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), args))


@pytest.mark.parametrize("backend", ("auto", "dense", "tiled", "flash"))
@pytest.mark.parametrize(("dtype", "bits"), ((torch.bfloat16, 8), (torch.float16, 11)))
def test_half_precision(backend, dtype, bits):
    """Against float64 on the same rounded inputs: sums are kept in float32.

    What remains is the rounding of the output (2^-bits relative, halved) and, in gradients, of the
    output that enters them and, in fused kernels, of the probabilities: four roundings in all.
    """
    args = inputs(0, 72, dtype, width=D)
    spans = policies()["runs"]
    wide = tuple(x.double() for x in args)
    out = span_attention(*args, spans, backend=backend)
    assert out.dtype == dtype
    expected = span_attention(*wide, spans, backend="dense")
    assert relative(out.double(), expected) < 2 * 2.0**-bits

    def first(args, backend):
        return grad(
            lambda *a: span_attention(*a, spans, backend=backend).double().sin().sum(), ARGS
        )(*args)

    got = first(args, backend)
    assert all(g.dtype == dtype for g in got)
    assert error([g.double() for g in got], first(wide, "dense")) < 4 * 2.0**-bits


def test_autocast():
    args = inputs(0, 72, torch.float32, width=D)
    spans = policies()["runs"]
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("auto", "dense", "tiled"):
            out = span_attention(*args, spans, backend=backend)
            assert out.dtype == torch.bfloat16
            low = [x.bfloat16() for x in args]
            expected = span_attention(*(x.double() for x in low), spans, backend="dense")
            assert relative(out.double(), expected) < 2 * 2.0**-8


def test_autocast_leaves_float64_alone():
    """As torch does; half precision would be wrong in the third digit."""
    args = inputs(0, 72, torch.float64, width=D)
    spans = policies()["runs"]
    want = span_attention(*args, spans, backend="dense")
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("auto", "dense", "tiled"):
            out = span_attention(*args, spans, backend=backend)
            assert out.dtype == torch.float64
            # Sums over 72 keys in another order.
            assert relative(out, want) < 1e-13


def test_one_row_of_spans_serves_all():
    args = inputs()
    spans = random_spans(rows=1)
    every = Spans(*(x.expand(B, -1) for x in spans))
    for backend in ("dense", "tiled"):
        got = span_attention(*args, spans, backend=backend)
        assert torch.equal(got, span_attention(*args, every, backend=backend))


def test_auto_says_what_it_chose(caplog):
    args = inputs(0, 72, width=D)
    with caplog.at_level(logging.DEBUG, "metafocus.attention"):
        span_attention(*args, policies()["runs"])
        span_attention(*args, policies()["random"])
    assert "flash, " in caplog.messages[0] and "not fused, since " in caplog.messages[1]
    assert "tiled, since the tensors are on cpu" in caplog.messages[2]


def test_the_third_derivative():
    """Refused by all that would need it by hand, and there for the dense form."""
    q, k, v = inputs(0, 72, width=D)
    spans = policies()["runs"]
    small = (q[:1, :1, :3, :2], k[:1, :1, :3, :2], v[:1, :1, :3, :2])
    few = Spans(torch.zeros(1, 3).long(), torch.tensor([[1, 2, 3]]))
    third = hessian(lambda x: grad(lambda y: loss(few, "dense")(y, *small[1:]))(x).sum())(small[0])
    assert third.isfinite().all() and third.abs().max() > 0
    for backend in ("auto", "tiled", "flash"):
        for outside in (lambda f: grad(f), lambda f: lambda x: jvp(f, (x,), (x,))[1]):
            thrice = outside(lambda x, b=backend: second(loss(spans, b))(x, k, v)[0].sum())
            with pytest.raises(TransformError, match="and a third is asked for"):
                thrice(q)


def test_forward_mode_in_forward_mode():
    q, k, v = inputs(0, 72, width=D)
    f = loss(policies()["runs"], "tiled")
    inner = lambda x: jvp(lambda y: f(y, k, v), (x,), (q,))[1]  # noqa: E731
    with pytest.raises(TransformError, match="two nested"):
        jvp(inner, (q,), (q,))


def wrong(**changes):
    q, k, v = inputs()
    call = {"q": q, "k": k, "v": v, "spans": random_spans(), **changes}
    return lambda: span_attention(**call)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            wrong(backend="cuda"),
            "backend='cuda' must be one of dense, auto, tiled, flash, triton, flex",
        ),
        (wrong(q=torch.zeros(2, 3)), r"q must be a floating-point tensor \[B, heads, S, D\]"),
        (wrong(k=inputs()[1].float()), "k must be .* of the type and device of q"),
        (wrong(k=inputs(heads=(4, 3))[1]), r"H a multiple of Hkv; got \[2, 4, 11, 5\]"),
        (wrong(k=inputs(length=9)[1], v=inputs(length=9)[2]), "attention from a cache"),
        (wrong(spans=random_spans(length=9)), r"spans.start must be an integer tensor \[2, 11\]"),
        (wrong(spans=Spans(*(x.float() for x in random_spans()))), "spans.start must be"),
        (wrong(softcap=-1.0), "softcap=-1.0 must be positive"),
        (wrong(sinks=torch.zeros(3)), "one floating-point logit for each of the 4 heads"),
        (wrong(sinks=torch.zeros(4), backend="flex"), "no sinks"),
        (
            wrong(spans=Spans(*(torch.full((B, S), x) for x in (0, S + 1))), backend="tiled"),
            "beyond the 11 keys",
        ),
        (
            # Without a check this kills the process: the kernel divides by a number of keys.
            wrong(
                spans=Spans(*(torch.full((B, S), x) for x in (-2, 1))),
                backend="flash",
                v=inputs(width=D)[2],
            ),
            r"the span of query 0 in row 0 is \[-2, 1\), beyond the 11 keys",
        ),
        (wrong(backend="flash", softcap=2.0, v=inputs(width=D)[2]), "cannot serve"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input(call, text):
    with pytest.raises(ProblemError, match=text):
        call()


def test_the_example_of_the_design():
    q = torch.randn(1, 4, 6, 8)
    k = v = torch.randn(1, 2, 6, 8)
    spans = mf.masks.causal({"input_ids": torch.zeros(1, 6)})
    assert mf.attention.span_attention(q, k, v, spans).shape == q.shape


@pytest.mark.parametrize("backend", ("auto", "tiled", "flash"))
def test_plain_dual_tensors(backend):
    """`torch.autograd.forward_ad` without functorch: of the output, and of its gradient."""
    batch, found = chat_batch(72), []
    spans = mf.masks.context_bidirectional(batch)
    args, way = inputs(length=72, width=D), inputs(1, length=72, width=D)
    for name in (backend, "dense"):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(x.clone().requires_grad_(), t)
                for x, t in zip(args, way, strict=True)
            ]
            value = loss(spans, name)(*duals)
            grads = torch.autograd.grad(value, duals, create_graph=True)
            found.append([forward_ad.unpack_dual(x).tangent for x in (value[None], *grads)])
    assert error(*found) < EXACT


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ("grad", "jvp", "vmap"))
def test_transforms_in_compiled_code(kind):
    """The opaque operator has no derivative there: forward mode would give zeros, silently."""
    args, way = inputs(length=72, width=D), inputs(1, length=72, width=D)
    f = loss(mf.masks.causal(chat_batch(72)), "auto")
    run = {
        "grad": lambda *a: grad(f, ARGS)(*a),
        "jvp": lambda *a: [jvp(f, a, way)[1]],
        "vmap": lambda *a: [vmap(lambda t: f(*a[:2], a[2] * t))(torch.ones(2).double())],
    }[kind]
    torch._dynamo.reset()
    got = torch.compile(run, backend="aot_eager")(*args)
    assert error(got, run(*args)) < EXACT


def test_modes_do_not_look_into_attention():
    class Asked(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            asked.append(func)
            return func(*args, **(kwargs or {}))

    asked = []
    q = torch.randn(1, 2, 80, 8)
    spans = Spans(torch.zeros(1, 80).long(), torch.arange(1, 81)[None])
    with Asked():
        span_attention(q, q, q, spans)
    assert asked == []


def test_a_subclass_keeps_its_overrides_in_attention():
    class Counted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    seen = []
    q = torch.randn(1, 2, 40, 8)
    spans = Spans(torch.zeros(1, 40).long(), torch.arange(1, 41)[None])
    out = span_attention(q.as_subclass(Counted), q, q, spans)
    assert seen and isinstance(out, Counted)
    assert torch.equal(out.as_subclass(torch.Tensor), span_attention(q, q, q, spans))
