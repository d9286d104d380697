"""AdamW, RMSprop, Adagrad and Muon against torch.optim and central differences; learned rates."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from problems import (
    FAST,
    assert_close,
    central_difference,
    flat,
    maml,
    regression,
)

import metafocus as mf
from metafocus.solvers.clipping import normalised

pytestmark = pytest.mark.usefixtures("float64")


def loss(fast, slow, data):
    return regression(fast, slow, data) + 0.1 * (fast["2.weight"] ** 4).sum()


PROBLEM = mf.Problem(loss, loss, lambda slow, support: {k: slow[k] for k in FAST})

# --- torch.optim -----------------------------------------------------------------------------

STEPS = 30
PAIRS = {
    "adamw": (mf.AdamW(0.03, STEPS), torch.optim.AdamW, {"lr": 0.03}),
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


def torch_run(leaves, optimizer, options, data, steps=STEPS):
    rival = optimizer(list(leaves.values()), **options)
    for _ in range(steps):
        rival.zero_grad()
        loss(leaves, None, data).backward()
        rival.step()
    return {k: v.detach() for k, v in leaves.items()}


@pytest.mark.parametrize("name", PAIRS)
def test_trajectories_are_those_of_torch_optim(name):
    solver, optimizer, options = PAIRS[name]
    case = maml()
    data = case.episode(0).support
    want = torch_run(
        {k: case.outer[k].clone().requires_grad_() for k in FAST}, optimizer, options, data
    )
    # Thirty steps of rounding in another order of operations.
    assert_close(mf.adapt(PROBLEM, case.outer, data, solver=solver).params, want, 1e-12)
    assert (flat(want) - flat({k: case.outer[k] for k in FAST})).norm() > 0.05


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


ZERO = {
    "adamw": mf.AdamW(0.1, 2),
    "rmsprop": mf.RMSprop(0.1, 2, momentum=0.5),
    "rmsprop centered": mf.RMSprop(0.1, 2, centered=True),
    "adagrad": mf.Adagrad(0.1, 2),
    "adagrad initial": mf.Adagrad(0.1, 2, initial=0.1),
    "muon": mf.Muon(0.1, 2, nesterov=False),
    "muon nesterov": mf.Muon(0.1, 2),
}


@pytest.mark.parametrize("way", ["graph", "segments", "forward"])
@pytest.mark.parametrize("name", ZERO)
def test_zero_gradients_have_finite_derivatives_of_both_orders(name, way):
    # LoRA's start: with B = 0 the gradient of A is exactly zero, and that of B is not.
    def low_rank(fast, slow, x):
        return ((x @ fast["A"].mT @ fast["B"].mT - x * slow["s"] + fast["c"] * 0) ** 2).mean()

    def init(slow, support=None):
        return {"A": slow["A"], "B": torch.zeros(3, 2), "c": torch.zeros(3)}

    problem = mf.Problem(low_rank, lambda f, s, x: low_rank(f, s, x) + f["c"].sum(), init)
    meta = mf.bilevel(problem, solver=ZERO[name], estimator=WAYS[way])
    g = torch.Generator().manual_seed(0)
    outer = {"A": torch.randn(2, 3, generator=g), "s": torch.randn(3, generator=g)}
    x = torch.randn(4, 3, generator=g)

    def hypergradient(o):
        return torch.func.grad(lambda o: meta(o, mf.Episode(x, x))[0])(o)

    first = hypergradient(outer)
    assert flat(first).isfinite().all() and flat(first).any()
    second = torch.func.grad(lambda o: sum((v**2).sum() for v in hypergradient(o).values()))(outer)
    assert flat(second).isfinite().all() and flat(second).any()


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


# --- constructors ----------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize("make", [mf.AdamW, mf.RMSprop, mf.Adagrad, mf.Muon])
def test_common_arguments_out_of_range(make):
    for steps in (-1, True, 2.0):
        with pytest.raises(ValueError, match=f"steps must be an integer >= 0 .* got {steps!r}"):
            make(0.1, steps)
    for lr in (-0.1, NAN):
        with pytest.raises(ValueError, match=f"lr must be a number >= 0 .*, got {lr}"):
            make(lr, 1)
    with pytest.raises(ValueError, match="weight_decay must be >= 0, got nan"):
        make(0.1, 1, weight_decay=NAN)
    with pytest.raises(ValueError, match=r"eps must be positive, got 0\.0"):
        make(0.1, 1, eps=0.0)
    assert make(mf.per_step(lambda o, t: 0.1), 0).steps == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mf.RMSprop(0.1, 1, alpha=1.0), r"alpha must be in \[0, 1\), got 1\.0"),
        (lambda: mf.RMSprop(0.1, 1, momentum=NAN), r"momentum must be in \[0, 1\), got nan"),
        (lambda: mf.Adagrad(0.1, 1, lr_decay=-1.0), r"lr_decay must be >= 0, got -1\.0"),
        (lambda: mf.Adagrad(0.1, 1, initial=-1.0), r"initial must be >= 0, got -1\.0"),
        (lambda: mf.Muon(0.1, 1, momentum=1.0), r"momentum must be in \[0, 1\), got 1\.0"),
        (lambda: mf.Muon(0.1, 1, ns_steps=0), "ns_steps must be an integer >= 1, got 0"),
        (lambda: mf.Muon(0.1, 1, ns_steps=2.5), "ns_steps must be an integer >= 1, got 2.5"),
        (lambda: mf.Muon(0.1, 1, adjust="rms"), r"adjust must be one of .*, got 'rms'"),
        (lambda: mf.Muon(0.1, 1, ns_coefficients=(1.0,)), "ns_coefficients must be three"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_adamw_is_adam_with_the_decay_of_torch():
    assert mf.AdamW(0.1, 2) == mf.Adam(0.1, 2, weight_decay=0.01)
    assert mf.AdamW(0.1, 2, (0.5, 0.6), 1e-3, 0.2) == mf.Adam(0.1, 2, (0.5, 0.6), 1e-3, 0.2)


@pytest.mark.parametrize("solver", SMALL.values(), ids=SMALL)
def test_solvers_are_pure_values(solver):
    assert copy.deepcopy(solver) == solver
    with pytest.raises(AttributeError):
        solver.steps = 3
    fast = {"a": torch.ones(2, 3), "b": torch.ones(2)}
    grads = {"a": torch.full((2, 3), 0.3), "b": torch.full((2,), 0.2)}
    state = solver.init(fast)
    before = copy.deepcopy((fast, grads, state))
    solver.update(fast, grads, state, 0, {})
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            *map(torch.utils._pytree.tree_leaves, (before, (fast, grads, state))), strict=True
        )
    )


def test_implicit_still_refuses_weight_decay():
    case = maml()
    for solver in (mf.AdamW(0.1, 1), mf.Muon(0.1, 1, weight_decay=0.1)):
        meta = mf.bilevel(PROBLEM, solver=solver, estimator=mf.Implicit())
        with pytest.raises(mf.errors.ProblemError, match="weight_decay"):
            meta(case.outer, case.episode())


def test_muon_keeps_no_moments_of_matrices():
    means, moments = mf.Muon(0.1, 1).init({"w": torch.ones(2, 2), "b": torch.ones(2)})
    assert set(means) == {"w"}
    assert [set(m) for m in moments] == [{"b"}, {"b"}]
