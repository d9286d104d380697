"""The chunked token loss against plain cross entropy, in every order and mode."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from models import relative
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vmap

import metafocus as mf
from metafocus.comparison.memory import peak_bytes
from metafocus.lm.cross_entropy import LogitHead
from metafocus.lm.token_loss import token_loss
from metafocus.torch_internals import transforming

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

ROWS, WIDTH, VOCABULARY = 7, 4, 5
LOGIT_HEADS = [LogitHead(), LogitHead(0.5), LogitHead(2.0, 1.5)]
logit_heads = pytest.mark.parametrize("head", LOGIT_HEADS, ids=["plain", "scaled", "capped"])
biased = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
# One row at a time, a chunk that does not divide the rows, all at once.
chunks = pytest.mark.parametrize("chunk", [1, 3, 100])


def inputs(bias=True, rows=ROWS, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, WIDTH), (VOCABULARY, WIDTH)] + [(VOCABULARY,)] * bias
    floats = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    targets[1::3] = -100
    return floats, targets


def plain(h, w, b=None, *, y, head):
    logits = head(F.linear(h, w, b).double() if h.dtype != torch.float64 else F.linear(h, w, b))
    return F.cross_entropy(logits, y, reduction="sum")


def ours(h, w, b=None, *, y, head, chunk=3):
    return token_loss(h, w, y, bias=b, logit_head=head, chunk=chunk)


def pair(bias, head, chunk=3):
    """Our loss, the plain one, and where: functions of the floating-point tensors alone."""
    at, y = inputs(bias)
    return (
        lambda *xs: ours(*xs, y=y, head=head, chunk=chunk),
        lambda *xs: plain(*xs, y=y, head=head),
        at,
    )


def close(a, b):
    """The same float64 arithmetic in another order: sums round as their largest terms do.

    So an entry that is left over when large ones cancel has their error, not one of its own size.
    """
    for x, y in zip(*(torch.utils._pytree.tree_leaves(z) for z in (a, b)), strict=True):
        largest = y.detach().abs().max().item()
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13 * max(largest, 1.0))


def leaves(at):
    return [x.clone().requires_grad_() for x in at]


@chunks
@logit_heads
@biased
def test_value_and_first_derivative(bias, head, chunk):
    f, g, at = pair(bias, head, chunk)
    indices = tuple(range(len(at)))
    close(f(*at), g(*at))
    expected = grad(g, indices)(*at)
    close(grad(f, indices)(*at), expected)
    xs = leaves(at)
    close(torch.autograd.grad(f(*xs), xs), expected)
    with torch.no_grad():
        assert not f(*xs).requires_grad


@logit_heads
@biased
def test_every_subset_of_inputs_that_require_grad(bias, head):
    """On the tape and under transforms, also in the second derivative."""
    f, g, at = pair(bias, head)
    for needs in itertools.product([False, True], repeat=len(at)):
        chosen = tuple(i for i, n in enumerate(needs) if n)
        if not chosen:
            continue

        def square(loss, xs, chosen=chosen):
            first = torch.autograd.grad(loss(*xs), [xs[i] for i in chosen], create_graph=True)
            return sum((x * x).sum() for x in first)

        def tape(loss, needs=needs, chosen=chosen, square=square):
            xs = [x.clone().requires_grad_(n) for x, n in zip(at, needs, strict=True)]
            return torch.autograd.grad(square(loss, xs), [xs[i] for i in chosen])

        def func(loss, chosen=chosen):
            def norm(*xs):
                return sum((x * x).sum() for x in grad(loss, chosen)(*xs))

            return grad(norm, chosen)(*at)

        expected = tape(g)
        close(tape(f), expected)
        close(func(f), expected)


@logit_heads
@biased
def test_numerical_checks(bias, head):
    """First derivatives in both modes, batched, and second ones in reverse over reverse."""
    f, _, at = pair(bias, head)
    assert gradcheck(f, leaves(at), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, leaves(at), check_batched_grad=True)


@logit_heads
@biased
def test_numerical_check_of_forward_over_reverse(bias, head):
    f, _, at = pair(bias, head)
    assert gradgradcheck(
        f,
        leaves(at),
        check_fwd_over_rev=True,
        check_rev_over_rev=False,
        check_undefined_grad=False,
    )


@chunks
@logit_heads
def test_hessian_by_every_route(head, chunk):
    f, g, at = pair(True, head, chunk)
    every = (0, 1, 2)
    expected = hessian(g, every)(*at)
    direction = tuple(torch.randn_like(x) for x in at)
    product = jvp(grad(g, every), tuple(at), direction)[1]

    close(jacrev(grad(f, every), every)(*at), expected)
    close(hessian(f, every)(*at), expected)  # jacfwd(jacrev)
    close(jvp(grad(f, every), tuple(at), direction)[1], product)
    # Forward mode inside: the derivative of a slope.
    close(grad(lambda *xs: jvp(f, xs, direction)[1], every)(*at), product)
    # The tape.
    xs = leaves(at)
    first = torch.autograd.grad(f(*xs), xs, create_graph=True)
    close(torch.autograd.grad(first, xs, direction), product)
    # The tape, above a transform.
    xs = leaves(at)
    close(torch.autograd.grad(grad(f, every)(*xs), xs, direction), product)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, d) for x, d in zip(at, direction, strict=True)]
        got = [forward_ad.unpack_dual(x).tangent for x in grad(f, every)(*duals)]
    close(tuple(got), product)


@logit_heads
def test_vmap(head):
    """Over all inputs, over the hidden states alone, and over the weight alone."""
    batches = [inputs(True, seed=s) for s in range(3)]
    stacked = [torch.stack(x) for x in zip(*[b[0] for b in batches], strict=True)]
    y = torch.stack([b[1] for b in batches])
    every = (0, 1, 2)
    for dims in [(0, 0, 0, 0), (0, None, None, 0), (None, 0, 0, None)]:
        at = [x if d == 0 else x[0] for x, d in zip((*stacked, y), dims, strict=True)]
        *floats, targets = at

        def many(loss, dims=dims, targets=targets):
            return lambda *xs: vmap(lambda h, w, b, y: loss(h, w, b, y=y, head=head), in_dims=dims)(
                *xs, targets
            )

        close(many(ours)(*floats), many(plain)(*floats))

        def sums(loss, many=many):
            return lambda *xs: (many(loss)(*xs) ** 2).sum()

        close(grad(sums(ours), every)(*floats), grad(sums(plain), every)(*floats))

        def each(loss, dims=dims, at=at):
            def one(h, w, b, y):
                return grad(lambda *xs: loss(*xs, y=y, head=head), every)(h, w, b)

            return vmap(one, in_dims=dims)(*at)

        close(each(ours), each(plain))

        def twice(loss, sums=sums, floats=floats):
            xs = leaves(floats)
            first = torch.autograd.grad(sums(loss)(*xs), xs, create_graph=True)
            return torch.autograd.grad(sum((x * x).sum() for x in first), xs)

        close(twice(ours), twice(plain))

        def products(loss, dims=dims, at=at):
            def one(h, w, b, y):
                xs = (h, w, b)
                return jvp(grad(lambda *xs: loss(*xs, y=y, head=head), every), xs, xs)[1]

            return vmap(one, in_dims=dims)(*at)

        close(products(ours), products(plain))


@logit_heads
def test_third_derivative_is_exact(head):
    f, g, at = pair(True, head)
    direction = [torch.randn_like(x) for x in at]

    def third_by_tape(loss):
        xs = leaves(at)
        found = loss(*xs)
        for _ in range(2):
            slopes = torch.autograd.grad(found, xs, create_graph=True)
            found = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))
        return torch.autograd.grad(found, xs)

    def third_by_func(loss):
        def slope(inner):
            return lambda *xs: sum(
                (s * d).sum() for s, d in zip(grad(inner, (0, 1, 2))(*xs), direction, strict=True)
            )

        return grad(slope(slope(loss)), (0, 1, 2))(*at)

    expected = third_by_tape(g)
    assert sum(x.abs().sum() for x in expected) > 1e-2
    close(third_by_tape(f), expected)
    close(third_by_func(f), expected)


def test_nested_forward_mode_is_refused():
    f, _, at = pair(False, LogitHead())
    with pytest.raises(mf.errors.TransformError, match="nested"):
        jvp(lambda h: jvp(lambda x: f(x, at[1]), (h,), (h,))[1], (at[0],), (at[0],))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@logit_heads
def test_low_precision(dtype, head):
    """Gradients in the type of the inputs, statistics in float32."""
    at, y = inputs(True, rows=64, dtype=dtype)
    exact = [x.double() for x in at]
    every = (0, 1, 2)
    expected = grad(lambda *xs: plain(*xs, y=y, head=head), every)(*exact)
    value = plain(*exact, y=y, head=head)
    xs = leaves(at)
    loss = ours(*xs, y=y, head=head, chunk=8)
    taped = torch.autograd.grad(loss, xs)
    func = grad(lambda *xs: ours(*xs, y=y, head=head, chunk=8), every)(*at)
    assert loss.dtype == torch.float32
    # Each logit and each residual is rounded once, to eps; the sums are in float32.
    eps = torch.finfo(dtype).eps
    assert abs(loss.item() - value.item()) < 4 * eps * abs(value.item())
    for found in (taped, func):
        for got, want, x in zip(found, expected, at, strict=True):
            assert got.dtype == x.dtype
            assert relative(got.double(), want) < 8 * eps


def test_sums_over_chunks_are_wide():
    """4096 equal contributions: a bfloat16 sum stops growing at 256 of them."""
    h = torch.ones(4096, 1, dtype=torch.bfloat16)
    w = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    token_loss(h, w, torch.zeros(4096, dtype=torch.int64), chunk=1).backward()
    assert w.grad is not None and w.grad.tolist() == [[-2048.0], [2048.0]]


@pytest.mark.parametrize("kind", ["tape", "func"])
def test_autocast(kind):
    """As F.linear under autocast: a bfloat16 product, gradients in the types of the inputs."""
    at, y = inputs(True, rows=64, dtype=torch.float32)
    head = LogitHead()

    def run(loss):
        if kind == "func":
            with torch.autocast("cpu", torch.bfloat16):
                return grad(lambda *xs: loss(*xs, y=y, head=head), (0, 1, 2))(*at)
        xs = leaves(at)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(*xs, y=y, head=head)
        return torch.autograd.grad(value, xs)

    exact = grad(lambda *xs: plain(*xs, y=y, head=head), (0, 1, 2))(*[x.double() for x in at])
    for got, theirs, want in zip(run(ours), run(plain), exact, strict=True):
        assert got.dtype == theirs.dtype == torch.float32
        assert 1e-5 < relative(got.double(), want) < 2 * relative(theirs.double(), want) + 1e-2


@pytest.mark.parametrize("kind", ["tape", "func"])
def test_nothing_scored(kind):
    """No rows, or only ignored ones: zero, and zero gradients that are tensors."""
    for rows in (0, 3):
        (h, w, b), _ = inputs(rows=rows)
        y = torch.full((rows,), -100)
        if kind == "tape":
            xs = leaves((h, w, b))
            value = ours(*xs, y=y, head=LogitHead())
            found = torch.autograd.grad(value, xs, create_graph=True)
            again = torch.autograd.grad(sum((x * x).sum() for x in found), xs)
            assert all(not x.any() for x in again)
        else:
            found = grad(lambda *xs, y=y: ours(*xs, y=y, head=LogitHead()), (0, 1, 2))(h, w, b)
            value = ours(h, w, b, y=y, head=LogitHead())
        assert value == 0
        assert [x.shape for x in found] == [h.shape, w.shape, b.shape]
        assert all(not x.any() for x in found)


def test_rows_that_are_not_scored_may_hold_anything():
    """Large values at padded positions leave no NaN behind."""
    (h, w), y = inputs(bias=False)
    h[1] = 1e308
    for found in (
        torch.autograd.grad(ours(*(xs := leaves((h, w))), y=y, head=LogitHead()), xs),
        grad(lambda h, w: ours(h, w, y=y, head=LogitHead()), (0, 1))(h, w),
    ):
        assert all(torch.isfinite(x).all() for x in found) and not found[0][1].any()


def test_large_logits_are_stable():
    (h, w), y = inputs(bias=False)
    f = lambda h, w: ours(h, w, y=y, head=LogitHead())  # noqa: E731
    g = lambda h, w: plain(h, w, y=y, head=LogitHead())  # noqa: E731
    close(f(1e5 * h, w), g(1e5 * h, w))
    xs = leaves((1e5 * h, w))
    close(torch.autograd.grad(f(*xs), xs), torch.autograd.grad(g(*xs), xs))


def test_compiled():
    (h, w, b), y = inputs()
    step = torch.compile(
        lambda h, w, b: grad(lambda *xs: ours(*xs, y=y, head=LogitHead(2.0, 1.5)), (0, 1, 2))(
            h, w, b
        ),
        backend="aot_eager",
        fullgraph=True,
    )
    close(
        step(h, w, b),
        grad(lambda *xs: plain(*xs, y=y, head=LogitHead(2.0, 1.5)), (0, 1, 2))(h, w, b),
    )


@pytest.mark.parametrize("order", [1, 2])
def test_memory_does_not_hold_all_logits(order):
    rows, vocabulary, chunk = 512, 2000, 32
    h = torch.randn(rows, 16, requires_grad=True)
    w = torch.randn(vocabulary, 16, requires_grad=True)
    y = torch.randint(0, vocabulary, (rows,))

    def run(loss):
        found = torch.autograd.grad(loss(), (h, w), create_graph=order == 2)
        if order == 2:
            found = torch.autograd.grad(sum((x * x).sum() for x in found), (h, w))
        return found

    new, peak = peak_bytes(lambda: run(lambda: token_loss(h, w, y, chunk=chunk)))
    old, naive = peak_bytes(lambda: run(lambda: F.cross_entropy(h @ w.T, y, reduction="sum")))
    for a, b in zip(new, old, strict=True):
        assert relative(a, b) < 1e-5
    logits = rows * vocabulary * 4
    # A few buffers of one chunk (a sixteenth of the logits), and the gradients.
    assert naive > 2 * logits
    assert peak < (0.5 if order == 1 else 1.0) * logits
    assert not transforming()


def test_refusals():
    (h, w, b), y = inputs()
    for bad, match in [
        (lambda: token_loss(h[None], w, y), r"hidden \[N, D\]"),
        (lambda: token_loss(h, w.T, y), r"hidden \[N, D\]"),
        (lambda: token_loss(h, w, y[:-1]), r"one target per row"),
        (lambda: token_loss(h, w, y, bias=b[:-1]), r"bias of shape \[5\], got \[4\]"),
        (lambda: token_loss(h, w, y, chunk=0), r"chunk >= 1 or None, got 0"),
    ]:
        with pytest.raises(mf.errors.ProblemError, match=match):
            bad()


def test_autocast_leaves_float64_alone():
    """As torch does: loss and gradients are those without autocast, to the last bit."""
    floats, y = inputs()
    found = []
    for on in (False, True):
        leaves = [x.clone().requires_grad_() for x in floats]
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = token_loss(leaves[0], leaves[1], y, bias=leaves[2], chunk=3)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(found[1], found[0], strict=True):
        assert got.dtype == torch.float64
        assert torch.equal(got, want)
