"""When operators are swapped for composites, and estimators through them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close, central_difference
from torch import nn

import metafocus as mf
from metafocus.autodiff.safe_operators import swapping
from metafocus.autodiff.safe_operators.swapping import differentiable_twice

pytestmark = pytest.mark.usefixtures("float64")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


X2, Y = randn(6, 3, seed=6), randn(6, 3, seed=11)
Q, K, V = randn(2, 4, 5, 3, seed=1), randn(2, 4, 6, 3, seed=2), randn(2, 4, 6, 3, seed=3)


# --- when they are used ---------------------------------------------------------------------------


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


# --- through the estimators -----------------------------------------------------------------------

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


# --- torch's silent errors under vmap -------------------------------------------------------------

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
