"""Single-loop algorithms: against matrix recursions, on quadratics with a known value function."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
import torch
from problems import assert_close, flat
from quadratics import F64, Quadratics, descend
from torch.utils import _pytree as pytree

import metafocus as mf

Q = Quadratics.make()
PROBLEM = Q.problem()
FULL = Q.full
# Eigenvalues of the inner Hessian are .2 .. 1, of the value function .55 .. 5.4.
ALGORITHMS = {
    "SOBA": mf.algorithms.SOBA(PROBLEM, inner_lr=0.9, v_lr=0.9),
    "AmIGO": mf.algorithms.AmIGO(PROBLEM, inner_lr=0.9, v_lr=0.9, inner_steps=3, v_steps=4),
    "StocBiO": mf.algorithms.StocBiO(PROBLEM, inner_lr=0.9, v_lr=0.9, inner_steps=3, v_steps=4),
    "F2SA": mf.algorithms.F2SA(PROBLEM, inner_lr=0.9, strength=10.0, growth=0.5, inner_steps=2),
    "BOME": mf.algorithms.BOME(PROBLEM, inner_lr=0.9, fast_lr=0.05, inner_steps=5),
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps_to(algorithm, gap: float, lr: float, most: int) -> int:
    """How many full-batch steps until the sub-optimality of the value function is below `gap`."""
    outer, state = Q.start(), algorithm.init(Q.start())
    for k in range(most):
        if Q.gap(outer["x"]) < gap:
            return k
        outer, state = descend(algorithm, outer, state, [FULL], lr)
    return most


def test_the_oracle_is_right():
    x = Q.start()["x"]
    assert_close(torch.autograd.functional.jacobian(Q.value, x), Q.hypergradient(x), 1e-13)
    assert Q.hypergradient(Q.solution()).norm() < 1e-13
    assert_close(torch.tensor(Q.gap(x), dtype=F64), Q.value(x) - Q.value(Q.solution()), 1e-12)


# --- the same trajectory as a matrix recursion -------------------------------------------------


def test_soba_is_its_matrix_recursion():
    (A, B, a), (C, D, E, c, d) = FULL
    x, z, v = Q.start()["x"], torch.zeros(5, dtype=F64), torch.zeros(5, dtype=F64)
    soba, lr = ALGORITHMS["SOBA"], 0.05
    outer, state = Q.start(), soba.init(Q.start())
    for _ in range(200):
        dz, dv = A @ z + B.T @ x + a, A @ v + C @ z + E.T @ x + c
        dx = D @ x + E @ z + d + B @ v
        grads, state, aux = soba.step(outer, state, FULL)
        outer = {"x": outer["x"] - lr * grads["x"]}
        loss = Q.outer_loss({"z": z}, {"x": x}, FULL.query)
        # Rounding over 200 steps of a contraction.
        assert_close(flat(tuple(aux)), torch.stack([loss, dz.norm(), dv.norm()]), 1e-10)
        z, v, x = z - 0.9 * dz, v - 0.9 * dv, x - lr * dx
    assert_close(outer["x"], x, 1e-10)
    assert_close(state.fast["z"], z, 1e-10)
    assert_close(state.v["z"], v, 1e-10)


@pytest.mark.parametrize("name", ["AmIGO", "StocBiO"])
def test_amigo_and_stocbio_are_their_matrix_recursions(name):
    (A, B, a), (C, D, E, c, d) = FULL
    x, z, v = Q.start()["x"], torch.zeros(5, dtype=F64), torch.zeros(5, dtype=F64)
    algorithm, lr = ALGORITHMS[name], 0.2
    outer, state = Q.start(), algorithm.init(Q.start())
    eye = torch.eye(5, dtype=F64)
    for _ in range(60):
        best = -torch.linalg.solve(A, B.T @ x + a)
        z = best + torch.linalg.matrix_power(eye - 0.9 * A, 3) @ (z - best)
        right = C @ z + E.T @ x + c
        if name == "StocBiO":
            series = [torch.linalg.matrix_power(eye - 0.9 * A, q) for q in range(4)]
            v = -0.9 * sum(series) @ right
        else:
            exact = -torch.linalg.solve(A, right)
            v = exact + torch.linalg.matrix_power(eye - 0.9 * A, 4) @ (v - exact)
        x = x - lr * (D @ x + E @ z + d + B @ v)
        outer, state = descend(algorithm, outer, state, [FULL], lr)
        # Rounding over 60 steps, and of two linear solves.
        assert_close(outer["x"], x, 1e-10)
        assert_close(state.fast["z"], z, 1e-10)
    if name == "AmIGO":
        assert_close(state.v["z"], v, 1e-10)


def test_f2sa_is_its_recursion():
    (A, B, a), (C, D, E, c, d) = FULL
    x, s = Q.start()["x"], 10.0
    z = y = torch.zeros(5, dtype=F64)
    f2sa = ALGORITHMS["F2SA"]
    outer, state = Q.start(), f2sa.init(Q.start())
    for _ in range(50):
        for _ in range(2):
            z = z - 0.9 * (A @ z + B.T @ x + a)
            y = y - 0.9 * (A @ y + B.T @ x + a + (C @ y + E.T @ x + c) / s)
        x, s = x - 0.05 * (D @ x + E @ y + d + s * B @ (y - z)), s + 0.5
        outer, state = descend(f2sa, outer, state, [FULL], 0.05)
    assert_close(outer["x"], x, 1e-10)
    assert_close(state.nudged["z"], y, 1e-10)
    assert state.strength.item() == 35.0


def test_bome_is_its_recursion_and_keeps_its_barrier():
    (A, B, a), (C, D, E, c, d) = FULL
    x, z = Q.start()["x"], torch.zeros(5, dtype=F64)
    bome = ALGORITHMS["BOME"]
    outer, state = Q.start(), bome.init(Q.start())
    idle = 0
    for _ in range(50):
        best = z
        for _ in range(5):
            best = best - 0.9 * (A @ best + B.T @ x + a)
        f = torch.cat([C @ z + E.T @ x + c, D @ x + E @ z + d])
        q = torch.cat([A @ z + B.T @ x + a, B @ (z - best)])
        multiplier = max(0.5 - float(f @ q) / float(q @ q), 0.0)
        move = f + multiplier * q
        # What the multiplier is for: along the move, q falls at least at the rate eta |q|^2.
        assert move @ q >= 0.5 * (q @ q) - 1e-12
        idle += multiplier == 0
        z, x = z - 0.05 * move[:5], x - 0.05 * move[5:]
        outer, state = descend(bome, outer, state, [FULL], 0.05)
    assert_close(outer["x"], x, 1e-10)
    assert_close(state.fast["z"], z, 1e-10)
    assert 0 < idle < 50, "both branches of the multiplier were taken"


def test_bome_at_an_exact_inner_minimum_has_no_barrier():
    def loss(fast, slow, x):
        return (fast["z"] ** 2).sum()

    def upper(fast, slow, x):
        return ((fast["z"] - slow["x"]) ** 2).sum()

    problem = mf.Problem(loss, upper, lambda slow, support: {"z": torch.zeros(2, dtype=F64)})
    bome = mf.algorithms.BOME(problem, inner_lr=0.1, fast_lr=0.1)
    outer = {"x": torch.ones(2, dtype=F64)}
    grads, state, aux = bome.step(outer, bome.init(outer), mf.Episode(None, None))
    assert_close(grads["x"], torch.full((2,), 2.0, dtype=F64), 1e-15)
    assert_close(state.fast["z"], torch.full((2,), 0.2, dtype=F64), 1e-15)
    assert aux.residual == 0


def saba_by_hand(terms, lr, outer_lr):
    """Tables as Python lists, one term after the other."""
    A, B, a = Q.inner
    C, D, E, c, d = Q.outer
    n, m = len(A), len(C)
    x, z, v = Q.start()["x"], torch.zeros(5, dtype=F64), torch.zeros(5, dtype=F64)

    def inner(i):
        return [A[i] @ z + B[i].T @ x + a[i], A[i] @ v, B[i] @ v]

    def upper(j):
        return [C[j] @ z + E[j].T @ x + c[j], D[j] @ x + E[j] @ z + d[j]]

    def reduced(new, table, i):
        means = [sum(column) / len(table) for column in zip(*table, strict=True)]
        directions = [x - old + mean for x, old, mean in zip(new, table[i], means, strict=True)]
        table[i] = new
        return directions

    inner_table, outer_table = [inner(i) for i in range(n)], [upper(j) for j in range(m)]
    for i, j in terms:
        dz, hv, mv = reduced(inner(i), inner_table, i)
        fz, fx = reduced(upper(j), outer_table, j)
        z, v, x = z - lr * dz, v - lr * (hv + fz), x - outer_lr * (fx + mv)
    return x, z, v


def test_saba_is_its_recursion():
    saba = mf.algorithms.SABA(PROBLEM, inner_lr=0.2, v_lr=0.2)
    generator = rng(1)
    episodes = [mf.algorithms.draw(Q.data, generator=generator) for _ in range(150)]
    order = [(int(e.support.number), int(e.query.number)) for e in episodes]
    x, z, v = saba_by_hand(order, 0.2, 0.1)
    outer, state = descend(saba, Q.start(), saba.init(Q.start(), Q.data), episodes, 0.1)
    # Rounding over 150 steps.
    assert_close(outer["x"], x, 1e-10)
    assert_close(state.fast["z"], z, 1e-10)
    assert_close(state.v["z"], v, 1e-10)


def test_saba_is_unbiased_at_any_state():
    # The mean over all pairs of terms is the full-batch direction, whatever the memory holds.
    saba = mf.algorithms.SABA(PROBLEM, inner_lr=0.2, v_lr=0.2)
    soba = mf.algorithms.SOBA(PROBLEM, inner_lr=0.2, v_lr=0.2)
    generator = rng(2)
    outer, state = descend(
        saba,
        Q.start(),
        saba.init(Q.start(), Q.data),
        [mf.algorithms.draw(Q.data, generator=generator) for _ in range(30)],
        0.1,
    )
    grads, fast, v = [], [], []
    for i in range(12):
        for j in range(8):
            term = [
                mf.algorithms.Term(torch.tensor(k), tuple(x[k] for x in half))
                for k, half in ((i, Q.inner), (j, Q.outer))
            ]
            g, after, _ = saba.step(outer, state, mf.Episode(*term))
            grads.append(g["x"])
            fast.append(after.fast["z"])
            v.append(after.v["z"])
    want, after, _ = soba.step(outer, mf.algorithms.SOBAState(state.fast, state.v), FULL)
    assert torch.stack(grads).std(0).min() > 1e-3, "single estimates do differ"
    # Rounding of a mean over 96.
    assert_close(torch.stack(grads).mean(0), want["x"], 1e-12)
    assert_close(torch.stack(fast).mean(0), after.fast["z"], 1e-12)
    assert_close(torch.stack(v).mean(0), after.v["z"], 1e-12)


def test_fresh_batches_are_used_in_order():
    (A, B, a), (C, D, E, c, d) = Q.inner, FULL.query
    algorithm = dataclasses.replace(ALGORITHMS["StocBiO"], fresh=True)
    x, z = Q.start()["x"], torch.zeros(5, dtype=F64)
    batches = tuple(x[:8] for x in Q.inner)
    grads, state, aux = algorithm.step(
        Q.start(), algorithm.init(Q.start()), mf.Episode(batches, FULL.query)
    )
    for i in range(3):
        z = z - 0.9 * (A[i] @ z + B[i].T @ x + a[i])
    v = torch.zeros(5, dtype=F64)
    for i in range(3, 7):
        v = v - 0.9 * (A[i] @ v + C @ z + E.T @ x + c)
    assert_close(state.fast["z"], z, 1e-13)
    assert_close(grads["x"], D @ x + E @ z + d + B[7] @ v, 1e-13)
    assert_close(aux.stationarity, (A[3] @ z + B[3].T @ x + a[3]).norm(), 1e-13)
    # Equal batches are the same as one.
    same = tuple(x.expand(8, *x.shape) for x in FULL.support)
    got = algorithm.step(Q.start(), algorithm.init(Q.start()), mf.Episode(same, FULL.query))
    want = ALGORITHMS["StocBiO"].step(Q.start(), algorithm.init(Q.start()), FULL)
    assert_close(flat(got), flat(want), 1e-13)


# --- convergence -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lr", "most"),
    # Oracle calls for 1e-6, from a start at 3.2; a gradient or a product is one call.
    # SOBA: 3 a step, 241 steps.  AmIGO: 8 a step (3 + 1 + 4), 57 steps.
    [("SOBA", 0.05, 280), ("AmIGO", 0.2, 70)],
)
def test_full_batches_converge_to_the_solution(name, lr, most):
    assert steps_to(ALGORITHMS[name], 1e-6, lr, most) < most
    outer, state = Q.start(), ALGORITHMS[name].init(Q.start())
    outer, state = descend(ALGORITHMS[name], outer, state, [FULL] * 6 * most, lr)
    # Linear convergence goes on to rounding.
    assert Q.gap(outer["x"]) < 1e-20
    assert_close(state.fast["z"], Q.best(Q.solution()), 1e-9)


def test_stocbio_converges_up_to_the_bias_of_its_series():
    # Fixed point: v = -(I - (I - lr A)^Q) A^-1 grad F. |I - .9 A|^Q = .82^Q: 40 terms, 4e-4.
    (A, B, _), (C, D, E, c, d) = FULL
    stocbio = dataclasses.replace(ALGORITHMS["StocBiO"], v_steps=40)
    assert steps_to(stocbio, 1e-6, 0.2, 70) < 70
    for terms, low, high in ((4, 1e-4, 10.0), (40, 1e-14, 1e-8)):
        algorithm = dataclasses.replace(stocbio, v_steps=terms)
        state = algorithm.init(Q.start())
        outer, state = descend(algorithm, Q.start(), state, [FULL] * 300, 0.2)
        x, eye = outer["x"], torch.eye(5, dtype=F64)
        z = Q.best(x)
        kept = eye - torch.linalg.matrix_power(eye - 0.9 * A, terms)
        v = -kept @ torch.linalg.solve(A, C @ z + E.T @ x + c)
        assert (D @ x + E @ z + d + B @ v).norm() < 1e-12
        assert low < Q.gap(x) < high


@pytest.mark.parametrize("strength", [10.0, 100.0])
def test_f2sa_converges_to_the_penalised_solution(strength):
    f2sa = mf.algorithms.F2SA(PROBLEM, inner_lr=0.9, strength=strength, inner_steps=5)
    outer, state = descend(f2sa, Q.start(), f2sa.init(Q.start()), [FULL] * 400, 0.15)
    # Linear convergence to rounding, amplified by the strength.
    assert_close(outer["x"], Q.penalised(strength), 1e-11)
    assert_close(state.fast["z"], Q.best(outer["x"]), 1e-11)


def test_the_growing_strength_of_f2sa_removes_the_bias():
    f2sa = mf.algorithms.F2SA(PROBLEM, inner_lr=0.9, strength=1.0, growth=0.5, inner_steps=5)
    outer, state = descend(f2sa, Q.start(), f2sa.init(Q.start()), [FULL] * 1200, 0.15)
    assert state.strength.item() == 601.0
    # Within the bias at the strength reached, and it follows: twice that of a fixed 601.
    bias = (Q.penalised(601.0) - Q.solution()).norm()
    assert (outer["x"] - Q.solution()).norm() < 2 * bias
    assert Q.gap(outer["x"]) < 1e-5


# --- behaviour -------------------------------------------------------------------------------


def some_step(name):
    """An algorithm, outer parameters, a state after a few steps, and an episode."""
    if name == "SABA":
        saba = mf.algorithms.SABA(PROBLEM, inner_lr=0.2, v_lr=0.2)
        generator = rng(3)
        episodes = [mf.algorithms.draw(Q.data, generator=generator) for _ in range(4)]
        outer, state = descend(saba, Q.start(), saba.init(Q.start(), Q.data), episodes[:3], 0.1)
        return saba, outer, state, episodes[3]
    algorithm = ALGORITHMS[name]
    outer, state = descend(algorithm, Q.start(), algorithm.init(Q.start()), [FULL] * 3, 0.05)
    return algorithm, outer, state, FULL


NAMES = [*ALGORITHMS, "SABA"]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_pure_detached_and_resumes(name):
    algorithm, outer, state, episode = some_step(name)
    before = flat(state).clone()
    want = algorithm.step(outer, state, episode)
    assert torch.equal(flat(state), before)
    tracked = {k: v.clone().requires_grad_() for k, v in outer.items()}
    got = algorithm.step(tracked, state, episode)
    assert torch.equal(flat(got), flat(want))
    assert not any(x.requires_grad for x in pytree.tree_leaves(got))
    # A checkpoint of plain containers, read back without trusting any class.
    leaves, spec = pytree.tree_flatten(state)
    file = io.BytesIO()
    torch.save(leaves, file)
    file.seek(0)
    resumed = pytree.tree_unflatten(torch.load(file, weights_only=True), spec)
    assert torch.equal(flat(algorithm.step(outer, resumed, episode)), flat(want))


@pytest.mark.parametrize("name", NAMES)
def test_many_problems_at_once(name):
    algorithm, outer, state, episode = some_step(name)
    scales = torch.tensor([0.5, 1.0, 1.5], dtype=F64)

    def scaled(tree, s):
        return pytree.tree_map(lambda x: x * s if x.is_floating_point() else x, tree)

    each = [(scaled(outer, s), scaled(state, s), scaled(episode, 1 + 0.1 * s)) for s in scales]
    stack = pytree.tree_map(lambda *x: torch.stack(x), *each)
    got = torch.func.vmap(algorithm.step)(*stack)
    want = pytree.tree_map(lambda *x: torch.stack(x), *[algorithm.step(*one) for one in each])
    # Rounding between a batched and a single evaluation.
    assert_close(flat(got), flat(want), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_inside_torch_func_grad_a_step_is_a_constant(name):
    algorithm, outer, state, episode = some_step(name)
    want = algorithm.step(outer, state, episode)

    def total(outer):
        result = algorithm.step(outer, state, episode)
        return flat(result[0]).sum() + outer["x"].sum(), result

    grads, got = torch.func.grad(total, has_aux=True)(outer)
    assert_close(flat(got), flat(want), 1e-13)
    assert torch.equal(grads["x"], torch.ones_like(outer["x"]))


@pytest.mark.parametrize("name", ["SOBA", "AmIGO", "StocBiO", "SABA"])
@pytest.mark.parametrize(
    ("hvp", "tolerance"),
    # Forward over reverse is exact; central differences of a quadratic have rounding / eps only.
    [(mf.hvp_forward, 1e-13), (mf.hvp_finite(), 1e-8)],
)
def test_every_way_to_multiply_gives_the_same_step(name, hvp, tolerance):
    algorithm, outer, state, episode = some_step(name)
    want = algorithm.step(outer, state, episode)
    got = dataclasses.replace(algorithm, hvp=hvp).step(outer, state, episode)
    assert_close(flat(got), flat(want), tolerance)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "SABA"])
def test_with_a_torch_optimiser_and_an_identity_init(name):
    # Optimisers write in place: neither the state nor the start may alias the parameter.
    def inner(fast, slow, x):
        return ((fast["w"] - slow["w"]) ** 2).sum() + 0.1 * ((fast["w"] - x) ** 2).sum()

    def upper(fast, slow, x):
        return ((fast["w"] - x) ** 2).sum()

    problem = mf.Problem(inner, upper)
    algorithm = dataclasses.replace(ALGORITHMS[name], problem=problem, inner_lr=0.3)
    weight = torch.nn.Parameter(torch.tensor([1.0, -1.0], dtype=F64))
    outer = {"w": weight}
    state = algorithm.init(outer)
    before = flat(state).clone()
    with torch.no_grad():
        weight.add_(1.0)
    assert torch.equal(flat(state), before)
    state = algorithm.init(outer)
    episode = mf.Episode(torch.zeros(2, dtype=F64), torch.full((2,), 2.0, dtype=F64))
    optimizer = torch.optim.SGD([weight], lr=0.05)
    by_hand = {"w": weight.detach().clone()}
    other = algorithm.init(by_hand)
    for _ in range(20):
        grads, state, _ = algorithm.step(outer, state, episode)
        weight.grad = grads["w"]
        optimizer.step()
        by_hand, other = descend(algorithm, by_hand, other, [episode], 0.05)
    assert_close(weight.detach(), by_hand["w"], 1e-13)
    # And towards the solution: the inner minimum w / 1.1 is the target 2 at w = 2.2.
    assert (weight.detach() - 2.2).norm() < (torch.tensor([2.0, 0.0], dtype=F64) - 2.2).norm()


@pytest.mark.parametrize("name", NAMES)
def test_prepare_is_part_of_both_levels(name):
    # Support and query depend on the outer parameters: the same problem written out agrees.
    def prepare(slow, episode):
        scale = slow["x"].sum()
        return mf.Episode(scale * episode.support, scale * episode.query)

    def inner(fast, slow, s):
        return 0.5 * (fast["z"] ** 2).sum() - (fast["z"] * s).sum()

    def upper(fast, slow, t):
        return 0.5 * ((fast["z"] - 2 * t) ** 2).sum() + (slow["x"] ** 2).sum()

    def inner_whole(fast, slow, s):
        return inner(fast, slow, slow["x"].sum() * s)

    def upper_whole(fast, slow, t):
        return upper(fast, slow, slow["x"].sum() * t)

    def start(slow, support):
        return {"z": torch.zeros(2, dtype=F64)}

    outer = {"x": torch.tensor([0.3, 0.5], dtype=F64)}
    data = torch.randn(2, 3, 2, generator=rng(), dtype=F64)
    template = mf.algorithms.SABA(PROBLEM, 0.2, 0.2) if name == "SABA" else ALGORITHMS[name]
    found = []
    for problem in (
        mf.Problem(inner, upper, start, prepare=prepare),
        mf.Problem(inner_whole, upper_whole, start),
    ):
        algorithm, generator = dataclasses.replace(template, problem=problem), rng(5)
        if name == "SABA":
            whole = mf.Episode(data[0], data[1])
            state = algorithm.init(outer, whole)
            episodes = [mf.algorithms.draw(whole, generator=generator) for _ in range(3)]
        else:
            state, episodes = algorithm.init(outer), [mf.Episode(data[0][0], data[1][0])] * 3
        found.append(descend(algorithm, outer, state, episodes, 0.1))
    assert_close(flat(found[0]), flat(found[1]), 1e-12)


def test_drawing_is_uniform_and_independent():
    generator = rng()
    draws = [mf.algorithms.draw(Q.data, generator=generator) for _ in range(4800)]
    table = torch.zeros(12, 8)
    for support, query in draws:
        table[support.number, query.number] += 1
        assert torch.equal(support.data[2], Q.inner[2][support.number])
    expected = 4800 / 96
    chi2 = ((table - expected) ** 2 / expected).sum().item()
    # Chi-squared with 95 degrees of freedom: mean 95, standard deviation 13.8; 4 of these.
    assert chi2 < 95 + 4 * 13.8
    again = mf.algorithms.draw(Q.data, generator=rng())
    assert again.support.number == draws[0].support.number


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mf.algorithms.SOBA(PROBLEM, 0.0, 0.1), "inner_lr must be positive, got 0.0"),
        (lambda: mf.algorithms.SOBA(PROBLEM, 0.1, -1.0), "v_lr must be positive, got -1.0"),
        (lambda: mf.algorithms.SABA(PROBLEM, 0.1, math.nan), "v_lr must be positive, got nan"),
        (
            lambda: mf.algorithms.AmIGO(PROBLEM, 0.1, 0.1, 0),
            "inner_steps must be an integer >= 1, got 0",
        ),
        (
            lambda: mf.algorithms.StocBiO(PROBLEM, 0.1, 0.1, 1, 2.5),
            "v_steps must be an integer >= 1, got 2.5",
        ),
        (lambda: mf.algorithms.F2SA(PROBLEM, 0.1, 0.0), "strength must be positive, got 0.0"),
        (lambda: mf.algorithms.F2SA(PROBLEM, 0.1, 1.0, -0.1), "growth must be >= 0, got -0.1"),
        (lambda: mf.algorithms.BOME(PROBLEM, 0.1, 0.1, 0.0), "eta must be positive, got 0.0"),
        (lambda: mf.algorithms.BOME(PROBLEM, 0.1, 0.0), "fast_lr must be positive, got 0.0"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_inputs():
    saba = mf.algorithms.SABA(PROBLEM, 0.1, 0.1)
    state = saba.init(Q.start(), Q.data)
    with pytest.raises(mf.errors.ProblemError, match=r"numbered terms.*got tuple and tuple.*draw"):
        saba.step(Q.start(), state, FULL)
    ragged = mf.Episode((torch.ones(3), torch.ones(4)), torch.ones(2))
    with pytest.raises(mf.errors.ProblemError, match=r"support must hold.*\[3, 4\]"):
        saba.init(Q.start(), ragged)
    with pytest.raises(mf.errors.ProblemError, match="support must hold"):
        mf.algorithms.draw(ragged, generator=rng())
    fresh = dataclasses.replace(ALGORITHMS["AmIGO"], fresh=True)
    with pytest.raises(mf.errors.ProblemError, match=r"= 8 batches.*got axis-0 sizes \[12\]"):
        fresh.step(Q.start(), fresh.init(Q.start()), Q.data)
    with pytest.raises(mf.errors.ProblemError, match=r"outer=\{\} with a single-loop algorithm"):
        ALGORITHMS["SOBA"].init({})


@pytest.mark.parametrize("name", NAMES)
def test_a_diverging_inner_problem_is_named(name):
    algorithm, outer, state, episode = some_step(name)
    broken = state._replace(fast={"z": state.fast["z"] * math.nan})
    with pytest.raises(mf.errors.NonFiniteError, match="inner gradient is nan"):
        algorithm.step(outer, broken, episode)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_is_not_a_scalar_is_named(name):
    algorithm, outer, state, episode = some_step(name)
    for field in ("inner_loss", "outer_loss"):
        problem = dataclasses.replace(PROBLEM, **{field: lambda fast, slow, data: fast["z"]})
        with pytest.raises(mf.errors.ProblemError, match=f"{field} must return a scalar"):
            dataclasses.replace(algorithm, problem=problem).step(outer, state, episode)
