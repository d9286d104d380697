"""Inner optimisers against torch.optim and higher, and at the points where formulas divide by 0."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from problems import FAST, SOLVERS, assert_close, flat, grads_of, maml, network, regression

import metafocus as mf
from metafocus.autodiff.guarded import safe_sqrt
from metafocus.solvers.descent import checked

pytestmark = pytest.mark.usefixtures("float64")


def loss(fast, slow, data):
    return regression(fast, slow, data) + 0.1 * (fast["2.weight"] ** 4).sum()


PROBLEM = mf.Problem(loss, loss, lambda slow, support: {k: slow[k] for k in FAST})

# --- torch.optim -----------------------------------------

PAIRS = {
    "sgd": (mf.SGD(0.05, 30), torch.optim.SGD, {"lr": 0.05}),
    "momentum": (
        mf.SGD(0.02, 30, momentum=0.9),
        torch.optim.SGD,
        {"lr": 0.02, "momentum": 0.9},
    ),
    "nesterov": (
        mf.SGD(0.02, 30, momentum=0.7, nesterov=True, weight_decay=0.2),
        torch.optim.SGD,
        {"lr": 0.02, "momentum": 0.7, "nesterov": True, "weight_decay": 0.2},
    ),
    "decay": (
        mf.SGD(0.05, 30, weight_decay=0.3),
        torch.optim.SGD,
        {"lr": 0.05, "weight_decay": 0.3},
    ),
    "adam": (mf.Adam(0.03, 30), torch.optim.Adam, {"lr": 0.03}),
    "adam betas": (
        mf.Adam(0.03, 30, betas=(0.5, 0.7), eps=1e-3),
        torch.optim.Adam,
        {"lr": 0.03, "betas": (0.5, 0.7), "eps": 1e-3},
    ),
    "adamw": (
        mf.Adam(0.03, 30, weight_decay=0.4),
        torch.optim.AdamW,
        {"lr": 0.03, "weight_decay": 0.4},
    ),
    "adam without moments": (
        mf.Adam(0.03, 30, betas=(0.0, 0.0)),
        torch.optim.Adam,
        {"lr": 0.03, "betas": (0.0, 0.0)},
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
    for _ in range(solver.steps):
        rival.zero_grad()
        value = loss(leaves, None, data)
        value.backward()
        rival.step()
        losses.append(value.detach())
    ours = mf.adapt(PROBLEM, case.outer, data, solver=solver)
    # Thirty steps of rounding in another order of operations.
    assert_close(ours.params, {k: v.detach() for k, v in leaves.items()}, 1e-12)
    assert_close(ours.losses, torch.stack(losses), 1e-12)


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


# --- higher -----------------------------------------


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


# --- zero gradients -----------------------------------------


def _lora(fast, slow, x):
    # B = 0 at the start, so the gradient by A is exactly 0 and its derivative by B is not.
    return ((fast["B"] @ (fast["A"] @ x) - slow["target"]) ** 2).sum()


LORA = mf.Problem(_lora, _lora, lambda slow, support: {"A": slow["A"], "B": slow["B"]})
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
}


@pytest.mark.parametrize("estimator", [mf.Unrolled(), mf.Unrolled(recompute=True)])
@pytest.mark.parametrize("name", AT_ZERO)
def test_exactly_zero_gradients_have_finite_derivatives_of_both_orders(name, estimator):
    meta = mf.bilevel(LORA, solver=AT_ZERO[name], estimator=estimator)
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
        meta = mf.bilevel(problem, solver=solver, estimator=mf.Unrolled())

        def f(w, c, meta=meta):
            return meta({"w": w, "c": c}, (torch.zeros(1), torch.zeros(1)))[0]

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


# --- learned rates -----------------------------------------


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


# --- constructors -----------------------------------------

NAN = float("nan")


@pytest.mark.parametrize("make", [mf.SGD, mf.Adam])
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
    assert make(0.0, 0).steps == 0


def test_arguments_out_of_range():
    for momentum in (-0.1, 1.0, NAN):
        with pytest.raises(ValueError, match=rf"momentum must be in \[0, 1\), got {momentum}"):
            mf.SGD(0.1, 1, momentum=momentum)
    with pytest.raises(ValueError, match=r"nesterov=True needs momentum > 0, got momentum=0\.0"):
        mf.SGD(0.1, 1, nesterov=True)
    for betas in ((1.0, 0.9), (0.9, -0.1), (0.9, NAN)):
        with pytest.raises(ValueError, match=r"betas must be in \[0, 1\)"):
            mf.Adam(0.1, 1, betas=betas)
    for eps in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match=f"eps must be positive, got {eps}"):
            mf.Adam(0.1, 1, eps=eps)
    for clip in (mf.clip_global, mf.clip_per_tensor):
        for limit in (0.0, -1.0, NAN):
            with pytest.raises(ValueError, match=f"limit must be positive, got {limit}"):
                clip(limit)


def test_solvers_are_values():
    assert mf.SGD(0.1, 2, clip=mf.clip_global(1.0)) == mf.SGD(0.1, 2, clip=mf.clip_global(1.0))
    assert copy.deepcopy(mf.Adam(0.1, 2)) == mf.Adam(0.1, 2)
    with pytest.raises(AttributeError):
        mf.SGD(0.1, 2).lr = 3


def test_update_does_not_touch_its_arguments():
    for solver in (mf.SGD(0.1, 2, momentum=0.9, weight_decay=0.1), mf.Adam(0.1, 2)):
        fast, grads = {"w": torch.ones(2)}, {"w": torch.ones(2)}
        state = solver.init(fast)
        solver.update(fast, grads, state, 0, {})
        assert torch.equal(flat([fast, grads]), torch.ones(4))
        assert not flat(state).any()


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
