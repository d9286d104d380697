"""Inner optimisers against torch.optim and higher, at zero gradients, and with learned rates."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from problems import (
    FAST,
    SOLVERS,
    assert_close,
    central_difference,
    flat,
    grads_of,
    maml,
    network,
    regression,
)

import metafocus as mf
from metafocus.autodiff.guarded import safe_sqrt
from metafocus.solvers.clipping import normalised
from metafocus.solvers.descent import checked, descend

pytestmark = pytest.mark.usefixtures("float64")


def loss(fast, slow, data):
    return regression(fast, slow, data) + 0.1 * (fast["2.weight"] ** 4).sum()


PROBLEM = mf.Problem(loss, loss, lambda slow, support: {k: slow[k] for k in FAST})


def test_a_loop_that_is_not_differentiated_keeps_no_graph_of_a_learned_rate():
    rate = torch.tensor(0.1, requires_grad=True)

    class Learned:
        steps = 2

        def init(self, params):
            return {}

        def update(self, params, grads, state, step, outer):
            return {k: p - rate * grads[k] for k, p in params.items()}, {"sum": rate + step}

    start = {"w": torch.ones(2)}
    params, state, losses, kept = descend(
        lambda fast, slow, data: (fast["w"] ** 2).sum(),
        *(Learned(), start, {}, {}, None, range(2)),
        differentiable=False,
        path=(0, 1),
    )
    found = [params["w"], state["sum"], *losses, *(fast["w"] for fast in kept)]
    assert len(found) == 6 and not any(x.requires_grad for x in found)


# --- torch.optim -----------------------------------------------------------------------------

STEPS = 30
PAIRS = {
    "sgd": (mf.SGD(0.05, STEPS), torch.optim.SGD, {"lr": 0.05}),
    "momentum": (
        mf.SGD(0.02, STEPS, momentum=0.9),
        torch.optim.SGD,
        {"lr": 0.02, "momentum": 0.9},
    ),
    "nesterov": (
        mf.SGD(0.02, STEPS, momentum=0.7, nesterov=True, weight_decay=0.2),
        torch.optim.SGD,
        {"lr": 0.02, "momentum": 0.7, "nesterov": True, "weight_decay": 0.2},
    ),
    "decay": (
        mf.SGD(0.05, STEPS, weight_decay=0.3),
        torch.optim.SGD,
        {"lr": 0.05, "weight_decay": 0.3},
    ),
    "adam": (mf.Adam(0.03, STEPS), torch.optim.Adam, {"lr": 0.03}),
    "adam betas": (
        mf.Adam(0.03, STEPS, betas=(0.5, 0.7), eps=1e-3),
        torch.optim.Adam,
        {"lr": 0.03, "betas": (0.5, 0.7), "eps": 1e-3},
    ),
    "adamw": (
        mf.Adam(0.03, STEPS, weight_decay=0.4),
        torch.optim.AdamW,
        {"lr": 0.03, "weight_decay": 0.4},
    ),
    "adam without moments": (
        mf.Adam(0.03, STEPS, betas=(0.0, 0.0)),
        torch.optim.Adam,
        {"lr": 0.03, "betas": (0.0, 0.0)},
    ),
    "adamw default": (mf.AdamW(0.03, STEPS), torch.optim.AdamW, {"lr": 0.03}),
    "rmsprop": (mf.RMSprop(0.01, STEPS), torch.optim.RMSprop, {"lr": 0.01}),
    "rmsprop momentum": (
        mf.RMSprop(0.005, STEPS, alpha=0.9, momentum=0.7, weight_decay=0.2),
        torch.optim.RMSprop,
        {"lr": 0.005, "alpha": 0.9, "momentum": 0.7, "weight_decay": 0.2},
    ),
    "rmsprop centered": (
        mf.RMSprop(0.002, STEPS, alpha=0.8, eps=1e-3, centered=True),
        torch.optim.RMSprop,
        {"lr": 0.002, "alpha": 0.8, "eps": 1e-3, "centered": True},
    ),
    "rmsprop centered momentum": (
        mf.RMSprop(0.002, STEPS, momentum=0.5, centered=True),
        torch.optim.RMSprop,
        {"lr": 0.002, "momentum": 0.5, "centered": True},
    ),
    "adagrad": (mf.Adagrad(0.1, STEPS), torch.optim.Adagrad, {"lr": 0.1}),
    "adagrad decays": (
        mf.Adagrad(0.2, STEPS, lr_decay=0.3, eps=1e-4, initial=0.05, weight_decay=0.1),
        torch.optim.Adagrad,
        {
            "lr": 0.2,
            "lr_decay": 0.3,
            "eps": 1e-4,
            "initial_accumulator_value": 0.05,
            "weight_decay": 0.1,
        },
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_trajectories_are_those_of_torch_optim(name):
    solver, optimizer, options = PAIRS[name]
    case = maml()
    data = case.episode(0).support
    leaves = {k: case.outer[k].clone().requires_grad_() for k in FAST}
    rival = optimizer(list(leaves.values()), **options)
    losses = []
    for _ in range(STEPS):
        rival.zero_grad()
        value = loss(leaves, None, data)
        value.backward()
        rival.step()
        losses.append(value.detach())
    want = {k: v.detach() for k, v in leaves.items()}
    ours = mf.adapt(PROBLEM, case.outer, data, solver=solver)
    # Thirty steps of rounding in another order of operations.
    assert_close(ours.params, want, 1e-12)
    assert_close(ours.losses, torch.stack(losses), 1e-12)
    assert (flat(want) - flat({k: case.outer[k] for k in FAST})).norm() > 0.05


@pytest.mark.parametrize("clip", ["global", "tensor"])
def test_clipping_is_that_of_torch(clip):
    case = maml()
    data = case.episode(0).support
    leaves = {k: case.outer[k].clone().requires_grad_() for k in FAST}
    rival = torch.optim.SGD(list(leaves.values()), lr=0.05)
    for _ in range(10):
        rival.zero_grad()
        loss(leaves, None, data).backward()
        groups = [list(leaves.values())] if clip == "global" else [[v] for v in leaves.values()]
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group, 0.5)
        rival.step()
    make = mf.clip_global if clip == "global" else mf.clip_per_tensor
    ours = mf.adapt(PROBLEM, case.outer, data, solver=mf.SGD(0.05, 10, clip=make(0.5)))
    # torch divides by the norm + 1e-6: up to 2e-6 for a norm of 0.5, ten steps.
    assert_close(ours.params, {k: v.detach() for k, v in leaves.items()}, 1e-5)


@pytest.fixture
def exact_muon(monkeypatch):
    """Let torch's Newton-Schulz iterations run in the dtype of the weights."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())


MUONS = {
    "plain": ({}, {}),
    "no nesterov": ({"nesterov": False, "momentum": 0.5}, {}),
    "decay": ({"weight_decay": 0.3, "ns_steps": 3}, {}),
    "rms": ({"adjust": "match_rms_adamw", "eps": 1e-3}, {"adjust_lr_fn": "match_rms_adamw"}),
    "coefficients": ({"ns_coefficients": (2.0, -1.5, 0.5), "momentum": 0.0}, {}),
}


@pytest.mark.parametrize("shape", [(3, 4), (4, 4), (5, 2), (1, 3)])
@pytest.mark.parametrize("name", MUONS)
def test_muon_is_torch_muon_in_float64(name, shape, exact_muon):
    ours, theirs = MUONS[name]
    theirs = {"weight_decay": 0.0, **{k: v for k, v in ours.items() if k != "adjust"}, **theirs}
    g = torch.Generator().manual_seed(0)
    start, goal = torch.randn(2, *shape, generator=g)

    def distance(fast, slow, data):
        return ((fast["w"] - goal) ** 2).sum() + (fast["w"] ** 4).sum()

    problem = mf.Problem(distance, distance, lambda slow, support: dict(slow))
    leaf = start.clone().requires_grad_()
    rival = torch.optim.Muon([leaf], lr=0.02, **theirs)
    for _ in range(10):
        rival.zero_grad()
        distance({"w": leaf}, None, None).backward()
        rival.step()
    got = mf.adapt(problem, {"w": start}, None, solver=mf.Muon(0.02, 10, **ours)).params["w"]
    # Ten steps of five iterations that stretch small singular values by 3.4 each.
    assert_close(got, leaf.detach(), 1e-12)
    assert (got - start).norm() > 0.04


def test_muon_is_near_torch_muon_as_it_is():
    g = torch.Generator().manual_seed(0)
    start, grad = torch.randn(2, 4, 3, generator=g)
    leaf = start.clone().requires_grad_()
    leaf.grad = grad
    torch.optim.Muon([leaf], lr=1.0, weight_decay=0.0).step()
    solver = mf.Muon(1.0, 1)
    fast = {"w": start}
    got, _ = solver.update(fast, {"w": grad}, solver.init(fast), 0, {})
    # bfloat16 keeps 8 bits: 4e-3 an operation, some dozens of them.
    assert_close(got["w"] - start, (leaf - start).detach(), 5e-2)


def test_muon_makes_the_step_orthogonal_where_its_polynomial_converges():
    solver = mf.Muon(1.0, 1, ns_steps=20, ns_coefficients=(1.875, -1.25, 0.375), momentum=0.0)
    grad = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    fast = {"w": torch.zeros(3, 5)}
    step = solver.update(fast, {"w": grad}, solver.init(fast), 0, {})[0]["w"]
    u, _, v = torch.linalg.svd(grad, full_matrices=False)
    # A third-order iteration, converged.
    assert_close(-step, u @ v, 1e-12)


def test_muon_on_tensors_that_are_no_matrices():
    g = torch.Generator().manual_seed(0)
    fast = {"conv": torch.randn(4, 3, 2, 2, generator=g), "bias": torch.randn(4, generator=g)}
    fast["gain"] = torch.randn((), generator=g)
    grads = {k: torch.randn(v.shape, generator=g) for k, v in fast.items()}
    solver = mf.Muon(0.1, 1, weight_decay=0.2)
    state = solver.init(fast)
    adam = mf.Adam(0.1, 1, weight_decay=0.2)
    rest = {k: fast[k] for k in ("bias", "gain")}
    adam_state = adam.init(rest)
    flattened = {"conv": fast["conv"].flatten(1)}
    matrix_state = solver.init(flattened)
    now, matrix = fast, flattened
    for step in range(3):
        now, state = solver.update(now, grads, state, step, {})
        rest, adam_state = adam.update(rest, {k: grads[k] for k in rest}, adam_state, step, {})
        matrix, matrix_state = solver.update(
            matrix, {"conv": grads["conv"].flatten(1)}, matrix_state, step, {}
        )
    assert list(now) == list(fast) and all(now[k].shape == v.shape for k, v in fast.items())
    # The same operations.
    assert_close({k: now[k] for k in rest}, rest, 1e-15)
    assert_close(now["conv"].flatten(1), matrix["conv"], 1e-15)


# --- higher ----------------------------------------------------------------------------------


def _module(outer):
    module = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    module.load_state_dict({k: outer[k] for k in FAST})
    return module


HIGHER = {
    "sgd": (mf.SGD(0.05, 5), torch.optim.SGD, {"lr": 0.05}),
    "momentum": (mf.SGD(0.05, 5, momentum=0.8), torch.optim.SGD, {"lr": 0.05, "momentum": 0.8}),
    "decay": (
        mf.SGD(0.05, 5, momentum=0.8, weight_decay=0.1),
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1},
    ),
    # higher adds eps to the root before the bias correction, torch and metafocus after it.
    "adam": (mf.Adam(0.05, 5, eps=1e-30), torch.optim.Adam, {"lr": 0.05, "eps": 1e-30}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", HIGHER)
@pytest.mark.parametrize("estimator", [mf.Unrolled(), mf.Unrolled(recompute=2)])
def test_meta_gradients_are_those_of_higher(name, estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        higher = pytest.importorskip("higher")
    solver, optimizer, options = HIGHER[name]
    case = maml()
    (x, y), (xq, yq) = case.episode(0)
    module = _module(case.outer)
    with higher.innerloop_ctx(
        module, optimizer(module.parameters(), **options), copy_initial_weights=False
    ) as (net, inner):
        for _ in range(solver.steps):
            inner.step(((net(x) - y) ** 2).mean())
        ((net(xq) - yq) ** 2).mean().backward()
    want = {k: v.grad for k, v in module.named_parameters()}

    problem = mf.Problem(regression, regression, lambda slow, support: dict(slow))
    meta = mf.bilevel(problem, solver=solver, estimator=estimator)
    got, _ = mf.hypergrad(meta)({k: case.outer[k] for k in FAST}, case.episode(0))
    # The same formulas; five steps of rounding in another order.
    assert_close(got, want, 1e-12)


# --- derivatives -----------------------------------------------------------------------------

SMALL = {
    "adamw": mf.AdamW(0.05, 3),
    "rmsprop": mf.RMSprop(0.02, 3, momentum=0.5, weight_decay=0.1),
    "rmsprop centered": mf.RMSprop(0.02, 3, alpha=0.9, centered=True),
    "adagrad": mf.Adagrad(0.1, 3, lr_decay=0.2),
    "muon": mf.Muon(0.05, 3, weight_decay=0.1),
    "muon clipped": mf.Muon(0.05, 3, nesterov=False, clip=mf.clip_global(0.5)),
    "rmsprop clipped": mf.RMSprop(0.02, 3, clip=mf.clip_per_tensor(0.3)),
}
WAYS = {
    "graph": mf.Unrolled(),
    "recompute": mf.Unrolled(recompute=True),
    "segments": mf.Unrolled(recompute=2),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "last": mf.Unrolled(last=1),
    "last rebuilt": mf.Unrolled(last=2, recompute=True),
}


@pytest.mark.parametrize("name", SMALL)
def test_all_ways_give_one_hypergradient(name):
    case = maml()
    episode = case.episode()

    def hypergradient(estimator):
        meta = mf.bilevel(PROBLEM, solver=SMALL[name], estimator=estimator)
        return mf.hypergrad(meta)(case.outer, episode)[0]

    want = hypergradient(mf.Unrolled())
    for way in ("segments", "forward"):
        # One derivative, formed in another order.
        assert_close(hypergradient(WAYS[way]), want, 1e-11)
    again = hypergradient(mf.Unrolled(last=2))
    assert_close(hypergradient(WAYS["last rebuilt"]), again, 1e-11)
    assert flat(again).sub(flat(want)).norm() > 1e-6 * flat(want).norm()


def over_all(meta, outer, episodes, how):
    total = mf.over_tasks(meta, how=how)
    return torch.func.grad(lambda o: total(o, episodes)[0])(outer)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("way", ["graph", "segments", "forward"])
def test_vmap_is_the_loop(name, way):
    case = maml()
    meta = mf.bilevel(PROBLEM, solver=SMALL[name], estimator=WAYS[way])
    vmapped, looped = (over_all(meta, case.outer, case.episodes, how) for how in ("vmap", "loop"))
    # The same operations, batched.
    assert_close(vmapped, looped, 1e-11)


# --- zero gradients and clips ----------------------------------------------------------------


def _lora(fast, slow, x):
    # B = 0 at the start, so the gradient by A is exactly 0 and its derivative by B is not. That by
    # c is always 0.
    return ((fast["B"] @ (fast["A"] @ x) - slow["target"] + 0 * fast["c"]) ** 2).sum()


LORA = mf.Problem(
    _lora,
    lambda fast, slow, x: _lora(fast, slow, x) + fast["c"].sum(),
    lambda slow, support: {"A": slow["A"], "B": slow["B"], "c": torch.zeros(3)},
)
LORA_OUTER = {
    "A": torch.tensor([[0.5, -1.0, 0.3], [0.2, 0.8, -0.6]]).double(),
    "B": torch.zeros(3, 2).double(),
    "target": torch.tensor([1.0, -2.0, 0.5]).double(),
}
LORA_EPISODE = (torch.tensor([1.0, 2.0, -1.0]).double(), torch.tensor([0.5, 1.0, 1.0]).double())

AT_ZERO = {
    "adam": mf.Adam(0.01, 3),
    "adam clipped": mf.Adam(0.01, 3, clip=mf.clip_global(0.1)),
    "per tensor": mf.SGD(0.1, 3, clip=mf.clip_per_tensor(1.0)),
    "per tensor active": mf.SGD(0.1, 3, clip=mf.clip_per_tensor(1e-3)),
    "global": mf.SGD(0.1, 3, momentum=0.5, clip=mf.clip_global(0.5)),
    "adamw": mf.AdamW(0.1, 2),
    "rmsprop": mf.RMSprop(0.1, 2, momentum=0.5),
    "rmsprop centered": mf.RMSprop(0.1, 2, centered=True),
    "adagrad": mf.Adagrad(0.1, 2),
    "adagrad initial": mf.Adagrad(0.1, 2, initial=0.1),
    "muon": mf.Muon(0.1, 2, nesterov=False),
    "muon nesterov": mf.Muon(0.1, 2),
}


@pytest.mark.parametrize("way", ["graph", "recompute", "segments", "forward"])
@pytest.mark.parametrize("name", AT_ZERO)
def test_exactly_zero_gradients_have_finite_derivatives_of_both_orders(name, way):
    meta = mf.bilevel(LORA, solver=AT_ZERO[name], estimator=WAYS[way])
    names = list(LORA_OUTER)
    sizes = [LORA_OUTER[k].numel() for k in names]

    def f(v):
        parts = zip(names, v.split(sizes), strict=True)
        return meta({k: p.reshape(LORA_OUTER[k].shape) for k, p in parts}, LORA_EPISODE)[0]

    x = flat(LORA_OUTER)
    first = torch.func.grad(f)(x)
    second = torch.func.jacrev(torch.func.jacrev(f))(x)
    assert first.isfinite().all() and first.any()
    assert second.isfinite().all() and second.any()
    leaf = x.clone().requires_grad_()
    (tape,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (tape2,) = torch.autograd.grad(tape.sum(), leaf)
    # Adam's derivative at zero is 1 / eps = 1e8: rounding of that size in the sums.
    assert_close(tape, first, 1e-11)
    assert_close(tape2, second.sum(0), 1e-7)


def test_all_gradients_exactly_zero():
    # Start at the minimum: every gradient is 0, Adam's moments stay 0.
    problem = mf.Problem(
        lambda fast, slow, x: ((fast["w"] - slow["c"]) ** 2).sum(),
        lambda fast, slow, x: (fast["w"] ** 3).sum(),
        lambda slow, support: {"w": slow["w"]},
    )
    outer = {"w": torch.ones(2), "c": torch.ones(2)}
    for name, solver in AT_ZERO.items():
        if name == "adamw":
            continue  # its decay moves away from the minimum
        meta = mf.bilevel(problem, solver=solver, estimator=mf.Unrolled())

        def f(w, c, meta=meta):
            return meta({"w": w, "c": c}, (torch.zeros(1), torch.zeros(1)))[0]

        with torch.no_grad():
            assert f(outer["w"], outer["c"]) == 2.0, name
        for order in (
            torch.func.grad(f, argnums=(0, 1)),
            torch.func.jacrev(torch.func.grad(f, argnums=1), argnums=(0, 1)),
            torch.func.hessian(f),
        ):
            assert flat(order(outer["w"], outer["c"])).isfinite().all(), name


def test_clip_at_zero_is_the_identity_map():
    zero = {"a": torch.zeros(2), "b": torch.zeros(1)}
    ones = {"a": torch.ones(2), "b": torch.ones(1)}
    for clip in (mf.clip_global(1.0), mf.clip_per_tensor(1.0)):
        out, tangent = torch.func.jvp(clip, (zero,), (ones,))
        assert not flat(out).any()
        assert flat(tangent).tolist() == [1.0, 1.0, 1.0]
        second = torch.func.jacrev(torch.func.jacrev(clip))(zero)
        assert not flat(second).any()


def test_clip_at_the_boundary_and_around():
    grads = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    # |g| = 5, |a| = 3, |b| = 4. At the boundary itself nothing is scaled.
    assert torch.equal(flat(mf.clip_global(5.0)(grads)), flat(grads))
    assert torch.equal(flat(mf.clip_global(6.0)(grads)), flat(grads))
    # 1 / sqrt(25) is exact to one rounding.
    assert_close(mf.clip_global(2.5)(grads), {k: v / 2 for k, v in grads.items()}, 1e-15)
    got = mf.clip_per_tensor(3.0)(grads)
    assert torch.equal(got["a"], grads["a"])
    assert_close(got["b"], torch.tensor([3.0]), 1e-15)
    above = mf.clip_global(5.0 * (1 - 1e-12))(grads)
    below = mf.clip_global(5.0 * (1 + 1e-12))(grads)
    # The scale is continuous there.
    assert_close(above, below, 1e-11)
    jacobian = torch.func.jacrev(mf.clip_global(5.0))(grads)
    assert torch.equal(jacobian["a"]["a"], torch.eye(2))


@pytest.mark.parametrize("clip", [mf.clip_global(0.5), mf.clip_per_tensor(0.5)])
def test_the_derivative_of_an_active_clip(clip):
    x = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.1])}
    torch.autograd.gradcheck(
        lambda a, b: tuple(clip({"a": a, "b": b}).values()),
        tuple(v.clone().requires_grad_() for v in x.values()),
        check_forward_ad=True,
    )
    torch.autograd.gradgradcheck(
        lambda a, b: tuple(clip({"a": a, "b": b}).values()),
        tuple(v.clone().requires_grad_() for v in x.values()),
    )


def test_an_own_clip_is_a_function():
    solver = mf.SGD(1.0, 1, clip=lambda g: {k: v.sign() for k, v in g.items()})
    new, _ = solver.update({"w": torch.zeros(3)}, {"w": torch.tensor([5.0, 0, -3])}, {}, 0, {})
    assert new["w"].tolist() == [-1.0, 0.0, 1.0]


def test_safe_sqrt_is_the_root_with_derivative_zero_at_zero():
    x = torch.tensor([0.0, 4.0])
    assert safe_sqrt(x).tolist() == [0.0, 2.0]
    grads = torch.func.vmap(torch.func.grad(safe_sqrt))(x)
    assert grads.tolist() == [0.0, 0.25]
    third = torch.func.vmap(torch.func.grad(torch.func.grad(torch.func.grad(safe_sqrt))))(x)
    # 3/8 x^(-5/2) = 3/256.
    assert third[0] == 0 and abs(third[1] - 3 / 256) < 1e-16


def test_normalised_divides_by_the_norm_or_by_the_least():
    x = torch.tensor([3.0, 4.0])
    assert normalised(x, 1e-7).tolist() == pytest.approx([0.6, 0.8], rel=1e-15)
    assert normalised(x * 0, 1e-7).tolist() == [0.0, 0.0]
    jacobian = torch.func.jacrev(lambda x: normalised(x, 0.1))
    assert_close(jacobian(x * 0), torch.eye(2) * 10, 1e-15)
    assert not torch.func.jacrev(jacobian)(x * 0).any()
    # The derivative of x / |x| is the projection on the complement of x, over |x|.
    want = (torch.eye(2) - torch.outer(x, x) / 25) / 5
    assert_close(jacobian(x), want, 1e-14)


def test_centered_variance_below_zero_by_rounding_is_zero():
    # After many equal gradients the variance is rounding alone; torch divides by NaN.
    solver = mf.RMSprop(0.1, 1, alpha=0.5, centered=True, eps=1.0)
    fast = {"w": torch.tensor([1.0, 1.0, 1.0])}
    grads = {"w": torch.tensor([0.1, 0.3, 0.7])}
    state = solver.init(fast)
    negative = False
    for step in range(200):
        fast, state = solver.update(fast, grads, state, step, {})
        negative |= bool((state[0]["w"] < state[1]["w"] ** 2).any())
        assert fast["w"].isfinite().all()
    assert negative


# --- learned rates and schedules -------------------------------------------------------------

EVERY = {
    "sgd": lambda lr, steps: mf.SGD(lr, steps, momentum=0.5),
    "adam": lambda lr, steps: mf.Adam(lr, steps, weight_decay=0.1),
    "adamw": mf.AdamW,
    "rmsprop": lambda lr, steps: mf.RMSprop(lr, steps, momentum=0.3),
    "adagrad": lambda lr, steps: mf.Adagrad(lr, steps, lr_decay=0.1),
    "muon": lambda lr, steps: mf.Muon(lr, steps, weight_decay=0.1),
}
TABLE = torch.tensor([0.01, 0.03, 0.02, 0.05], dtype=torch.float64)
RATES = {
    "scalar": lambda o: o["lrs"][0],
    "each": lambda o: {k: o[f"lr.{k}"] for k in FAST},
    "step": mf.per_step(lambda o, t: o["lrs"][t]),
    "step and each": mf.per_step(lambda o, t: {k: o[f"lr.{k}"] * o["lrs"][t] * 30 for k in FAST}),
    "table of rows": mf.per_step(lambda o, t: dict(zip(FAST, o["table"][t], strict=True))),
    "schedule": mf.per_step(lambda o, t: 0.05 * 0.8**t),
}


def learned():
    case = maml()
    table = 0.01 + 0.05 * torch.rand(4, 4, generator=torch.Generator().manual_seed(3))
    return case, {**case.outer, "lrs": TABLE, "table": table}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", EVERY)
def test_the_hypergradient_by_each_kind_of_rate(name, rate):
    case, outer = learned()
    episode = case.episode()
    solver = EVERY[name](RATES[rate], 4)
    meta = mf.bilevel(PROBLEM, solver=solver, estimator=mf.Unrolled())
    want = mf.hypergrad(meta)(outer, episode)[0]
    names = ["lrs", "table", *(f"lr.{k}" for k in FAST)]
    direction = {k: torch.randn(v.shape) * (k in names) for k, v in outer.items()}

    def moved(h):
        with torch.no_grad():
            return meta({k: v + h * direction[k] for k, v in outer.items()}, episode)[0]

    slope = central_difference(moved, torch.zeros(()), torch.ones(()), 1e-6)
    along = sum((want[k] * direction[k]).sum() for k in outer)
    # Central differences at rates of 1e-2: third derivatives of 1e6, times 1e-12.
    assert abs(along - slope) <= 1e-6 * abs(slope) + 1e-9
    assert (slope != 0) == (rate != "schedule")
    for estimator in (
        mf.Unrolled(recompute=True),
        mf.Unrolled(recompute=3),
        mf.Unrolled(hvp=mf.hvp_forward),
    ):
        meta = mf.bilevel(PROBLEM, solver=solver, estimator=estimator)
        # One derivative, formed in another order.
        assert_close(mf.hypergrad(meta)(outer, episode)[0], want, 1e-11)


@pytest.mark.parametrize("estimator", [mf.Unrolled(last=2), mf.Unrolled(last=2, recompute=2)])
def test_steps_keep_their_number_in_a_truncated_tail(estimator):
    case, outer = learned()
    episode = case.episode()
    seen = set()

    def rate(o, t):
        seen.add(t)
        return o["lrs"][t]

    meta = mf.bilevel(PROBLEM, solver=mf.SGD(mf.per_step(rate), 4), estimator=estimator)
    got = mf.hypergrad(meta)(outer, episode)[0]
    assert seen == {0, 1, 2, 3}
    assert got["lrs"][:2].tolist() == [0.0, 0.0] and got["lrs"][2:].all()
    # Two constant steps first, then two that are differentiated.
    fast = {k: outer[k] for k in FAST}
    for t in (0, 1):
        grads = torch.func.grad(loss)(fast, None, episode.support)
        fast = {k: fast[k] - TABLE[t] * grads[k] for k in FAST}

    def tail(lrs):
        now = fast
        for t in (2, 3):
            grads = torch.func.grad(loss)(now, None, episode.support)
            now = {k: now[k] - lrs[t] * grads[k] for k in FAST}
        return loss(now, None, episode.query)

    # The same derivative by another program.
    assert_close(got["lrs"], torch.func.grad(tail)(TABLE), 1e-12)


@pytest.mark.parametrize("estimator", [mf.Unrolled(), mf.Unrolled(recompute=3)])
def test_a_rate_per_step_under_vmap(estimator):
    case, outer = learned()
    solver = mf.Adam(mf.per_step(lambda o, t: o["lrs"][t]), 4)
    meta = mf.bilevel(PROBLEM, solver=solver, estimator=estimator)
    vmapped, looped = (over_all(meta, outer, case.episodes, how) for how in ("vmap", "loop"))
    assert_close(vmapped, looped, 1e-11)  # the same operations, batched
    assert vmapped["lrs"].all()


def test_a_constant_schedule_is_the_constant():
    case, outer = learned()
    for make in EVERY.values():
        plain = mf.adapt(PROBLEM, outer, case.episode().support, solver=make(0.03, 3))
        scheduled = mf.adapt(
            PROBLEM, outer, case.episode().support, solver=make(mf.per_step(lambda o, t: 0.03), 3)
        )
        assert_close(scheduled.params, plain.params, 0.0)


def test_rates_of_steps_are_those_of_torch_schedulers():
    case = maml()
    data = case.episode().support
    leaves = {k: case.outer[k].clone().requires_grad_() for k in FAST}
    rival = torch.optim.SGD(list(leaves.values()), lr=0.05)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(rival, 10)
    for _ in range(10):
        rival.zero_grad()
        loss(leaves, None, data).backward()
        rival.step()
        cosine.step()
    solver = mf.SGD(mf.per_step(lambda o, t: 0.025 * (1 + math.cos(math.pi * t / 10))), 10)
    got = mf.adapt(PROBLEM, case.outer, data, solver=solver).params
    assert_close(got, {k: v.detach() for k, v in leaves.items()}, 1e-12)


def test_wrong_tables_are_refused():
    case, outer = learned()
    support = case.episode().support
    short = mf.SGD(mf.per_step(lambda o, t: o["lrs"][t]), 5)
    with pytest.raises(
        mf.errors.ProblemError, match=r"no entry for inner step 4 .* take fewer steps"
    ):
        mf.adapt(PROBLEM, outer, support, solver=short)
    whole = mf.SGD(lambda o: o["lrs"], 4)
    with pytest.raises(
        mf.errors.ProblemError, match=r"got shape \[4\]. One rate per step: mf.per_step"
    ):
        mf.adapt(PROBLEM, outer, support, solver=whole)
    rows = mf.SGD(lambda o: {k: o["lrs"] if k == "2.bias" else 0.1 for k in FAST}, 4)
    with pytest.raises(mf.errors.ProblemError, match=r"'2.bias'\] has shape \[4\].* shape \[1\]"):
        mf.adapt(PROBLEM, outer, support, solver=rows)
    wide = mf.SGD(lambda o: {k: torch.ones(2, *o[k].shape) for k in FAST}, 4)
    with pytest.raises(mf.errors.ProblemError, match="does not broadcast"):
        mf.adapt(PROBLEM, outer, support, solver=wide)
    missing = mf.SGD(mf.per_step(lambda o, t: {"2.bias": 0.1}), 4)
    with pytest.raises(mf.errors.ProblemError, match="is on one side only"):
        mf.adapt(PROBLEM, outer, support, solver=missing)


def test_a_rate_that_closes_over_a_parameter_is_refused_where_it_would_be_missed():
    case = maml()
    free = torch.tensor(0.05, requires_grad=True)
    solver = mf.Adagrad(mf.per_step(lambda o, t: free), 2)
    meta = mf.bilevel(PROBLEM, solver=solver, estimator=mf.Unrolled(recompute=True))
    with pytest.raises(mf.errors.ClosureError, match="the solver"):
        meta(case.outer, case.episode())
    tape = mf.bilevel(PROBLEM, solver=solver, estimator=mf.Unrolled())
    tape(case.outer, case.episode())[0].backward()
    assert free.grad is not None and free.grad != 0


def test_a_rate_for_each_weight():
    case = maml()
    solver = SOLVERS["learned_rates"].solver(1)
    grads = {k: torch.ones_like(case.outer[k]) for k in FAST}
    fast = {k: case.outer[k] for k in FAST}
    new, _ = solver.update(fast, grads, solver.init(fast), 0, case.outer)
    for k in FAST:
        assert torch.equal(new[k], fast[k] - case.outer[f"lr.{k}"])


@pytest.mark.parametrize("solver", [mf.SGD, mf.Adam])
def test_wrong_rates_are_refused(solver):
    fast, grads = {"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(2), "b": torch.ones(1)}

    def step(rate):
        s = solver(lambda _: rate, 1)
        s.update(fast, grads, s.init(fast), 0, {})

    with pytest.raises(
        mf.errors.ProblemError, match=r"'b' is on one side only. Fast weights: \['a', 'b'\]"
    ):
        step({"a": torch.tensor(0.1)})
    with pytest.raises(mf.errors.ProblemError, match="'c' is on one side only"):
        step({"a": torch.tensor(0.1), "b": torch.tensor(0.1), "c": torch.tensor(0.1)})
    with pytest.raises(
        mf.errors.ProblemError, match=r"a scalar or a dict of rates, got shape \[2\]"
    ):
        step(torch.ones(2))


# --- constructors ----------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize("make", [mf.SGD, mf.Adam, mf.AdamW, mf.RMSprop, mf.Adagrad, mf.Muon])
def test_common_arguments_out_of_range(make):
    for steps in (-1, True, False, 2.0, "3", None):
        with pytest.raises(ValueError, match=f"steps must be an integer >= 0 .* got {steps!r}"):
            make(0.1, steps)
    for lr in (-0.1, NAN):
        with pytest.raises(ValueError, match=f"lr must be a number >= 0 .*, got {lr}"):
            make(lr, 1)
    for decay in (-1.0, NAN):
        with pytest.raises(ValueError, match=f"weight_decay must be >= 0, got {decay}"):
            make(0.1, 1, weight_decay=decay)
    for eps in (0.0, -1.0, NAN) if make is not mf.SGD else ():
        with pytest.raises(ValueError, match=f"eps must be positive, got {eps}"):
            make(0.1, 1, eps=eps)
    assert make(0.0, 0).steps == 0
    assert make(mf.per_step(lambda o, t: 0.1), 0).steps == 0


def test_arguments_out_of_range():
    wrong = [
        (mf.SGD, {"momentum": x}, rf"momentum must be in \[0, 1\), got {x}")
        for x in (-0.1, 1.0, NAN)
    ]
    wrong += [
        (mf.Adam, {"betas": x}, r"betas must be in \[0, 1\)")
        for x in ((1.0, 0.9), (0.9, -0.1), (0.9, NAN))
    ]
    wrong += [
        (mf.SGD, {"nesterov": True}, r"nesterov=True needs momentum > 0, got momentum=0\.0"),
        (mf.RMSprop, {"alpha": 1.0}, r"alpha must be in \[0, 1\), got 1\.0"),
        (mf.RMSprop, {"momentum": NAN}, r"momentum must be in \[0, 1\), got nan"),
        (mf.Adagrad, {"lr_decay": -1.0}, r"lr_decay must be >= 0, got -1\.0"),
        (mf.Adagrad, {"initial": -1.0}, r"initial must be >= 0, got -1\.0"),
        (mf.Muon, {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\.0"),
        (mf.Muon, {"ns_steps": 0}, "ns_steps must be an integer >= 1, got 0"),
        (mf.Muon, {"ns_steps": 2.5}, "ns_steps must be an integer >= 1, got 2.5"),
        (mf.Muon, {"adjust": "rms"}, r"adjust must be one of .*, got 'rms'"),
        (mf.Muon, {"ns_coefficients": (1.0,)}, "ns_coefficients must be three"),
    ]
    for make, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            make(0.1, 1, **options)
    for clip in (mf.clip_global, mf.clip_per_tensor):
        for limit in (0.0, -1.0, NAN):
            with pytest.raises(ValueError, match=f"limit must be positive, got {limit}"):
                clip(limit)


def test_adamw_is_adam_with_the_decay_of_torch():
    assert vars(mf.AdamW(0.1, 2)) == vars(mf.Adam(0.1, 2, weight_decay=0.01))
    one, other = mf.AdamW, mf.Adam
    assert vars(one(0.1, 2, (0.5, 0.6), 1e-3, 0.2)) == vars(other(0.1, 2, (0.5, 0.6), 1e-3, 0.2))


VALUES = {
    **SMALL,
    "sgd": mf.SGD(0.1, 2, momentum=0.9, weight_decay=0.1, clip=mf.clip_global(1.0)),
    "adam": mf.Adam(0.1, 2),
}


@pytest.mark.parametrize("name", VALUES)
def test_solvers_are_pure_values(name):
    solver = VALUES[name]
    assert copy.deepcopy(solver) == solver
    with pytest.raises(AttributeError):
        solver.steps = 3
    fast = {"a": torch.ones(2, 3), "b": torch.ones(2)}
    grads = {"a": torch.full((2, 3), 0.3), "b": torch.full((2,), 0.2)}
    state = solver.init(fast)
    before = copy.deepcopy((fast, grads, state))
    solver.update(fast, grads, state, 0, {})
    leaves = map(torch.utils._pytree.tree_leaves, (before, (fast, grads, state)))
    assert all(torch.equal(a, b) for a, b in zip(*leaves, strict=True))


def test_implicit_still_refuses_weight_decay():
    case = maml()
    for solver in (mf.AdamW(0.1, 1), mf.Muon(0.1, 1, weight_decay=0.1)):
        meta = mf.bilevel(PROBLEM, solver=solver, estimator=mf.Implicit())
        with pytest.raises(mf.errors.ProblemError, match="weight_decay"):
            meta(case.outer, case.episode())


def test_grads_of_is_what_the_tests_compare():
    leaf = torch.ones(2, requires_grad=True)
    leaf.sum().backward()
    assert torch.equal(grads_of({"a": leaf})["a"], torch.ones(2))
    assert network({k: maml().outer[k] for k in FAST}, torch.zeros(3, 1)).shape == (3, 1)


@pytest.mark.parametrize(
    "result", [None, {"w": 0.0}, (0.0,), (0.0, [1.0]), [0.0, {"w": 0.0}], (0.0, {"w": 0.0}, None)]
)
def test_a_direction_of_another_form_is_refused(result):
    with pytest.raises(mf.errors.ProblemError, match=r"direction must return \(loss, direction\)"):
        checked(result, {"w": torch.ones(1)})


def test_a_direction_keeps_its_derivative_and_its_loss_is_a_number_to_report():
    w = torch.ones(1, requires_grad=True)
    given = {"w": 3 * w}
    value, direction = checked((2 * w.sum(), given), {"w": torch.ones(1)})
    assert not value.requires_grad and value.item() == 2.0
    assert direction is given


def test_muon_keeps_no_moments_of_matrices():
    means, moments = mf.Muon(0.1, 1).init({"w": torch.ones(2, 2), "b": torch.ones(2)})
    assert set(means) == {"w"}
    assert [set(m) for m in moments] == [{"b"}, {"b"}]
