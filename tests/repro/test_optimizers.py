"""Published claims about inner optimisers and the ways to differentiate them."""

from __future__ import annotations

import pytest
import torch
from problems import FAST, flat, grads_of, maml, relative_error, scalar_rate, sinusoid_tasks

import metafocus as mf

pytestmark = pytest.mark.repro

F64 = torch.float64

# --- T16: learned rates ------------------------------------------------------------------------

NAMES = ("w1", "b1", "w2", "b2", "w3", "b3")


def relu_network(fast, x):
    h = torch.relu(x @ fast["w1"].mT + fast["b1"])
    h = torch.relu(h @ fast["w2"].mT + fast["b2"])
    return h @ fast["w3"].mT + fast["b3"]


def regression(fast, slow, data):
    return ((relu_network(fast, data[0]) - data[1]) ** 2).mean()


def weights(seed: int, hidden: int = 40) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "w1": torch.randn(hidden, 1, generator=g),
        "b1": torch.zeros(hidden),
        "w2": torch.randn(hidden, hidden, generator=g) * (2 / hidden) ** 0.5,
        "b2": torch.zeros(hidden),
        "w3": torch.randn(1, hidden, generator=g) * hidden**-0.5,
        "b3": torch.zeros(1),
    }


def sinusoids(tasks: int, queries: int, g: torch.Generator) -> mf.Episode:
    episodes = tuple(sinusoid_tasks(tasks, 5, queries, g))
    return mf.Episode(*torch.utils._pytree.tree_map(lambda x: x.float(), episodes))


def train(learned: bool, seed: int, iterations: int) -> float:
    """The mean squared error on 400 new tasks after one step on five points."""
    outer, rate = weights(seed), 0.01
    solver = mf.SGD(rate, steps=1)
    if learned:
        outer |= {f"lr.{k}": torch.full_like(v, rate) for k, v in outer.items()}
        solver = mf.SGD(lambda slow: {k: slow[f"lr.{k}"] for k in NAMES}, steps=1)
    problem = mf.Problem(regression, regression, lambda slow, support: {k: slow[k] for k in NAMES})
    meta = mf.over_tasks(mf.bilevel(problem, solver=solver, estimator=mf.Unrolled()))
    leaves = {k: v.requires_grad_() for k, v in outer.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=1e-3)
    g = torch.Generator().manual_seed(100 + seed)
    for _ in range(iterations):
        optimizer.zero_grad()
        meta(leaves, sinusoids(16, 10, g))[0].backward()
        optimizer.step()
    unseen = sinusoids(400, 50, torch.Generator().manual_seed(999))
    with torch.no_grad():
        return meta(leaves, unseen)[0].item()


@pytest.mark.claim(
    "T16",
    paper="Li et al., arXiv 1707.09835",
    says="learned rates per parameter beat a fixed rate at the same budget",
    published="1.13 fixed, 0.90 learned (factor 0.80)",
    note="1000 iterations of 16 tasks, not 60000: an ordering",
)
def test_t16_learned_rates_beat_a_fixed_rate(claim):
    """T16. Li et al., Meta-SGD, arXiv 1707.09835, table 1.

    Claim: on sinusoid regression with one inner step, learned rates per parameter beat MAML's
    fixed rate at the same budget.
    Published: 5-shot mean squared error 1.13 (MAML) and 0.90 (Meta-SGD) after 60000 iterations.
    Here 1000 iterations of 16 tasks, rate 0.01 fixed or as the start, two seeds.
    Tolerance: an ordering; asked for is a factor of 0.8, the published one, and over the seeds
    the worst learned against the best fixed.
    Ours: fixed 2.94 and 2.77, learned 1.66 and 1.40. Other fixed rates, not run here: 2.54 and
    2.54 with 0.003, 3.32 and 3.23 with 0.03, so that the best of them loses too.
    """
    fixed = [train(False, seed, 1000) for seed in (0, 1)]
    learned = [train(True, seed, 1000) for seed in (0, 1)]
    claim({"fixed": fixed, "learned": learned, "factor": max(learned) / min(fixed)})
    assert max(learned) < 0.8 * min(fixed), (fixed, learned)


# --- T17: central differences of the whole map -------------------------------------------------

SOLVERS = {
    "sgd": mf.SGD(scalar_rate, 4),
    "momentum": mf.SGD(scalar_rate, 4, momentum=0.9),
    "nesterov": mf.SGD(scalar_rate, 4, momentum=0.9, nesterov=True, weight_decay=0.1),
    "clipped": mf.SGD(scalar_rate, 4, clip=mf.clip_global(0.5)),
    "adam": mf.Adam(scalar_rate, 4),
    "adamw": mf.AdamW(scalar_rate, 4),
    "rmsprop": mf.RMSprop(scalar_rate, 4, momentum=0.5),
    "rmsprop centered": mf.RMSprop(scalar_rate, 4, centered=True),
    "adagrad": mf.Adagrad(scalar_rate, 4, lr_decay=0.1),
    "muon": mf.Muon(scalar_rate, 4),
    "per step": mf.SGD(mf.per_step(lambda outer, t: outer["log_lr"].exp() * 0.8**t), 4),
}


@pytest.mark.claim(
    "T17",
    paper="requirement",
    says="the hypergradient is the slope of inner and outer loop together, for every optimiser",
    published="equal to central differences",
)
@pytest.mark.parametrize("name", SOLVERS)
def test_t17_the_hypergradient_is_the_slope_of_the_whole_map(name, claim):
    """T17. A requirement on every differentiable inner optimiser.

    Claim: the hypergradient by the start and by the learned rate is the derivative of inner and
    outer loop together.
    Measured: relative error of the whole vector against central differences, every coordinate.
    Tolerance: 1e-6 relative; a step of 3e-7 leaves 1e-16 / 3e-7 of rounding and 1e-13 times third
    derivatives, which the roots of RMSprop's kind make large (its error falls with the step).
    Ours: 1e-9 to 6e-9, RMSprop 5e-8.
    """
    case = maml()
    episode = case.episode()
    meta = mf.bilevel(case.problem, solver=SOLVERS[name], estimator=mf.Unrolled())
    got = mf.hypergrad(meta)(case.outer, episode)[0]
    slopes = {}
    for k in (*FAST, "log_lr"):
        slopes[k] = torch.zeros_like(case.outer[k])
        for i in range(case.outer[k].numel()):
            ends = []
            for h in (3e-7, -3e-7):
                moved = case.outer[k].clone()
                moved.view(-1)[i] += h
                with torch.no_grad():
                    ends.append(meta({**case.outer, k: moved}, episode)[0])
            slopes[k].view(-1)[i] = (ends[0] - ends[1]) / 6e-7
    got = {k: got[k] for k in slopes}
    off = relative_error(got, slopes)
    claim(off)
    assert got["log_lr"] != 0
    assert off < 1e-6


@pytest.mark.claim(
    "T17",
    paper="requirement",
    says="an inner gradient of zero gives a finite hypergradient",
    published="finite; sqrt(v) + eps as written gives NaN",
)
@pytest.mark.parametrize("make", [mf.Adam, mf.AdamW, mf.RMSprop, mf.Adagrad, mf.Muon])
def test_t17_zero_gradients_give_finite_hypergradients(make, claim):
    """T17. The derivative of sqrt(v) + eps at v = 0.

    Claim: an inner gradient that is exactly zero gives a finite hypergradient.
    Measured: the formula as torch.optim writes it gives NaN (asserted).
    Tolerance: none, finite or not; weights without gradient and decay stay where they are.
    Ours: finite, for single entries and for all of them.
    """

    def loss(fast, slow, data):
        return ((fast["w"] * data) ** 2).sum() + ((fast["m"] * data) ** 2).sum()

    problem = mf.Problem(
        loss, lambda f, s, d: (f["w"].sum() + f["m"].sum()) ** 2, lambda s, support: dict(s)
    )
    outer = {"w": torch.tensor([1.0, 2.0], dtype=F64), "m": torch.ones(2, 2, dtype=F64)}
    mask = torch.tensor([1.0, 0.0], dtype=F64)
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    meta = mf.bilevel(problem, solver=make(0.1, 3), estimator=mf.Unrolled())
    value, aux = meta(leaves, mf.Episode(mask, mask))
    value.backward()
    zero = mf.Episode(0 * mask, mask)
    (value, aux), still = meta(leaves, zero), mf.hypergrad(meta)(outer, zero)[0]
    some = all(v.isfinite().all() and v.any() for v in grads_of(leaves).values())
    all_zero = all(v.isfinite().all() for v in still.values())
    claim({"some entries zero": some, "all entries zero": all_zero})
    assert some
    assert all_zero
    if make is not mf.AdamW:
        assert all(torch.equal(aux.params[k], outer[k]) for k in outer)
    w = torch.zeros((), dtype=F64, requires_grad=True)
    assert torch.autograd.grad((w * w).sqrt() + 1e-8, w)[0].isnan()


# --- T18 to T21: ways that must agree ----------------------------------------------------------

MANY = {
    "sgd": mf.SGD(scalar_rate, 12, momentum=0.5),
    "adam": mf.Adam(scalar_rate, 12),
    "rmsprop": mf.RMSprop(scalar_rate, 12, centered=True),
    "adagrad": mf.Adagrad(scalar_rate, 12),
    "muon": mf.Muon(scalar_rate, 12),
}


def hypergradient(solver, estimator, dtype=F64):
    case = maml()
    outer = {k: v.to(dtype) for k, v in case.outer.items()}
    episode = torch.utils._pytree.tree_map(lambda x: x.to(dtype), tuple(case.episode()))
    meta = mf.bilevel(case.problem, solver=solver, estimator=estimator)
    return mf.hypergrad(meta)(outer, mf.Episode(*episode))[0]


def rounded(params, seed):
    """Each number as it is, or one unit of rounding larger or smaller."""
    g = torch.Generator().manual_seed(seed)
    unit = torch.finfo(F64).eps
    units = {k: torch.randint(-1, 2, v.shape, generator=g, dtype=F64) for k, v in params.items()}
    return {k: v * (1 + unit * units[k]) for k, v in params.items()}


def largest_difference(got, want) -> float:
    return (flat(got) - flat(want)).abs().max().item() / flat(want).abs().max().item()


@pytest.mark.claim(
    "T18",
    paper="Chen et al., arXiv 1604.06174",
    says="rebuilding segments of an unroll in the backward pass changes nothing",
    published="0.0",
)
@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("name", MANY)
def test_t18_a_checkpointed_unroll_is_the_plain_one(name, size, claim):
    """T18. Chen et al., arXiv 1604.06174, for inner steps.

    Claim: rebuilding segments of an unroll in the backward pass changes nothing.
    Published / measured: 0.0 in two independent implementations.
    Tolerance: 1e-15 of the largest entry, not 0: the cotangents of what all steps share (the
    rate, the pull to the slow weights) are summed segment by segment, in another order.
    Ours: at most 1.6e-16.
    """
    want = hypergradient(MANY[name], mf.Unrolled())
    got = hypergradient(MANY[name], mf.Unrolled(recompute=size))
    off = largest_difference(got, want)
    claim(off)
    assert off <= 1e-15


@pytest.mark.claim(
    "T19",
    paper="MixFlow-MG, arXiv 2505.00793",
    says="forward over reverse is reverse over reverse, for every optimiser",
    published="equal",
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (F64, 1e-14)])
@pytest.mark.parametrize("name", MANY)
def test_t19_mixed_mode_is_reverse_over_reverse(name, dtype, tolerance, claim):
    """T19. MixFlow-MG, arXiv 2505.00793.

    Claim: forward over reverse gives the same hypergradient as reverse over reverse.
    Published / measured before: 6e-8 in float32, one step.
    Tolerance: 1e-6 in float32, some ten units of round-off after twelve steps; 1e-14 in float64.
    Ours: at most 3.1e-7 in float32 and 1.8e-15 in float64, both with RMSprop.
    """
    want = hypergradient(MANY[name], mf.Unrolled(), dtype)
    got = hypergradient(MANY[name], mf.Unrolled(hvp=mf.hvp_forward), dtype)
    off = largest_difference(got, want)
    claim({str(dtype).removeprefix("torch."): off})
    assert off <= tolerance


def linear_inner(fast, slow, data):
    return (fast["w"] * data).sum() + 0 * slow["w"].sum()


@pytest.mark.claim(
    "T20",
    paper="Finn et al., arXiv 1703.03400",
    says="first order is the exact hypergradient with the inner gradients held constant",
    published="equal; exact for a linear inner loss",
)
def test_t20_first_order_is_a_stopped_gradient(claim):
    """T20. Finn et al., arXiv 1703.03400, section 5.2; theory.

    Claim: first-order MAML is the exact hypergradient with the inner gradients held constant, and
    is exact where the inner loss is linear.
    Tolerance: 0 for the linear inner loss and 1e-15 against stopped gradients (the same
    operations). On the curved loss the two must differ, or the test would show nothing.
    Ours: 0.0 and 0.0; on the curved loss first order is off by 0.61.
    """
    case = maml()
    episode = case.episode()
    solver = mf.SGD(0.05, 3)
    leaves = {k: v.clone().requires_grad_() for k, v in case.outer.items()}
    fast = {k: leaves[k] for k in FAST}
    for _ in range(3):
        constant = {k: v.detach() for k, v in fast.items()}
        slow = {k: v.detach() for k, v in leaves.items()}
        grads = torch.func.grad(case.problem.inner_loss)(constant, slow, episode.support)
        fast = {k: fast[k] - 0.05 * grads[k] for k in FAST}
    case.problem.outer_loss(fast, leaves, episode.query).backward()
    got = hypergradient(solver, mf.FirstOrder())
    stopped = relative_error(got, grads_of(leaves))
    curved = relative_error(got, hypergradient(solver, mf.Unrolled()))

    problem = mf.Problem(
        linear_inner, lambda f, s, d: (f["w"] ** 3).sum(), lambda s, support: dict(s)
    )
    outer, data = {"w": torch.tensor([1.0, -2.0])}, torch.tensor([0.3, 0.7])
    both = [
        mf.hypergrad(mf.bilevel(problem, solver=mf.SGD(0.1, 3), estimator=e))(
            outer, mf.Episode(data, data)
        )[0]["w"]
        for e in (mf.FirstOrder(), mf.Unrolled())
    ]
    linear = relative_error({"w": both[0]}, {"w": both[1]})
    claim({"against stopped gradients": stopped, "linear": linear, "curved": curved})
    assert stopped <= 1e-15
    assert curved > 0.05
    assert torch.equal(*both) and both[0].all()


@pytest.mark.claim(
    "T21",
    paper="requirement",
    says="vmap over tasks is a loop over tasks",
    published="equal",
)
@pytest.mark.parametrize("how", ["graph", "segments", "forward", "first order"])
@pytest.mark.parametrize("name", MANY)
def test_t21_vmap_over_tasks_is_a_loop(name, how, claim):
    """T21. Claim: batching tasks by vmap changes nothing.

    Published / measured before: 3e-16 on MAML in float64.
    Tolerance: 1e-14, sums over tasks and matrix products in another order; or, where the problem
    is worse conditioned, as much as a loop moves when its outer parameters are rounded once more.
    Centered RMSprop is: it divides by the root of a difference of near equals.
    Ours: at most 2.5e-15; RMSprop 5.8e-13, where its loop moves by 3.6e-12.
    """
    estimator = {
        "graph": mf.Unrolled(),
        "segments": mf.Unrolled(recompute=5),
        "forward": mf.Unrolled(hvp=mf.hvp_forward),
        "first order": mf.FirstOrder(),
    }[how]
    case = maml()
    meta = mf.bilevel(case.problem, solver=MANY[name], estimator=estimator)

    def hypergradient(how, outer):
        return mf.hypergrad(mf.over_tasks(meta, how=how))(outer, case.episodes)[0]

    looped = hypergradient("loop", case.outer)
    off = largest_difference(hypergradient("vmap", case.outer), looped)
    again = [hypergradient("loop", rounded(case.outer, seed)) for seed in range(4)]
    moved = max(largest_difference(x, looped) for x in again)
    claim({"vmap against loop": off, "loop, parameters rounded once more": moved})
    assert off <= max(1e-14, moved)
