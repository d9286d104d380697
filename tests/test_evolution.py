"""Evolution strategies: against hand-written loops exactly, against gradients statistically.

All seeds are fixed, so every statistical test has one outcome; the bound is stated in standard
errors of the estimate, computed in closed form or from the pairs themselves.
"""

from __future__ import annotations

import math

import problems
import pytest
import torch
from problems import F64, assert_close, flat

import metafocus as mf

NONE = mf.Episode(None, None)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(outer, episode):
    """<c, a> + <d, b>, with an aux of its own."""
    c, d = episode
    return (c * outer["a"]).sum() + (d * outer["b"]).sum(), {"c": c}


def linear_case():
    g = rng(7)
    outer = {
        "a": torch.randn(3, generator=g, dtype=F64),
        "b": torch.randn(2, 2, generator=g).to(F64),
    }
    episode = mf.Episode(
        torch.randn(3, generator=g, dtype=F64), torch.randn(2, 2, generator=g).to(F64)
    )
    return outer, episode


def estimate(loss, outer, episode):
    grads, (value, aux) = mf.hypergrad(loss)(outer, episode)
    return grads, value, aux


def test_a_linear_loss_is_estimated_without_bias():
    # g = mean_i <c, e_i> e_i has the mean c and the variance (|c|^2 + c_k^2) / pairs.
    outer, episode = linear_case()
    pairs = 20_000
    loss = mf.algorithms.Evolution(linear, sigma=0.3, pairs=pairs, generator=rng())
    grads, value, aux = estimate(loss, outer, episode)
    want = flat(tuple(episode))
    error = flat(grads) - want
    standard = ((want @ want + want**2) / pairs).sqrt()
    # 4 standard errors: for 7 entries a right estimator fails with probability 4e-4.
    assert (error.abs() < 4 * standard).all()
    assert error.abs().max() > 0.01 * standard.min(), "an estimate from random pairs is not exact"
    # The value is that of the loss itself: no smoothing, no rounding.
    assert value == linear(outer, episode)[0]
    assert aux["c"] is episode.support


def test_the_error_falls_as_the_root_of_the_pairs():
    outer, episode = linear_case()
    want = flat(tuple(episode))

    def error(pairs: int) -> float:
        total = 0.0
        for seed in range(20):
            loss = mf.algorithms.Evolution(linear, sigma=1.0, pairs=pairs, generator=rng(seed))
            total += float((flat(estimate(loss, outer, episode)[0]) - want).square().sum())
        return math.sqrt(total / 20)

    # Closed form: E |error|^2 = (n + 1) |c|^2 / pairs with n = 7. From 20 repetitions of 7
    # entries the root mean square itself is known to about 10 %.
    for pairs in (10, 160):
        assert error(pairs) == pytest.approx(math.sqrt(8 * float(want @ want) / pairs), rel=0.3)


def bilevel_case(steps: int = 3):
    case = problems.maml(tasks=2)
    solver = mf.SGD(problems.scalar_rate, steps=steps, momentum=0.5)
    return case, mf.bilevel(case.problem, solver=solver, estimator=mf.Unrolled())


@torch.no_grad()
def by_hand(meta, outer, episode, sigma, pairs, generator):
    """One pair after the other, with Python loops and no vmap."""
    total = {k: torch.zeros_like(v) for k, v in outer.items()}
    for _ in range(pairs):
        noise = {
            k: torch.randn((1, *v.shape), generator=generator, dtype=v.dtype)[0]
            for k, v in outer.items()
        }
        up = meta({k: v + sigma * noise[k] for k, v in outer.items()}, episode)[0].item()
        down = meta({k: v - sigma * noise[k] for k, v in outer.items()}, episode)[0].item()
        total = {k: t + (up - down) / (2 * sigma * pairs) * noise[k] for k, t in total.items()}
    return total


def test_a_bilevel_estimate_equals_the_loop_over_pairs():
    case, meta = bilevel_case()
    loss = mf.algorithms.Evolution(meta, sigma=0.05, pairs=5, generator=rng(3))
    got, value, aux = estimate(loss, case.outer, case.episode())
    want = by_hand(meta, case.outer, case.episode(), 0.05, 5, rng(3))
    # The same numbers in another order: rounding, amplified by 1 / sigma.
    assert_close(got, want, 1e-11)
    with torch.no_grad():
        plain, plain_aux = meta(case.outer, case.episode())
    assert_close(value, plain, 1e-14)
    assert_close(aux.params, plain_aux.params, 1e-14)


def test_small_sigma_and_many_pairs_approach_the_hypergradient():
    case, meta = bilevel_case()
    exact, _ = mf.hypergrad(meta)(case.outer, case.episode())
    loss = mf.algorithms.Evolution(meta, sigma=1e-3, pairs=20_000, generator=rng(1))
    got = estimate(loss, case.outer, case.episode())[0]
    # sqrt((n + 1) / pairs) for n = 27 outer numbers is 0.037 relative; the smoothing bias at
    # sigma 1e-3 is of the order of 1e-5. Two standard errors.
    assert problems.relative_error(got, exact) < 0.075


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_every_way_to_differentiate_gives_the_same_estimate(chunk_size):
    case, meta = bilevel_case(steps=2)
    episode = case.episode()

    def fresh():
        return mf.algorithms.Evolution(
            meta, sigma=0.1, pairs=7, generator=rng(5), chunk_size=chunk_size
        )

    want = by_hand(meta, case.outer, episode, 0.1, 7, rng(5))
    leaves = case.leaves()
    fresh()(leaves, episode)[0].backward()
    direction = {k: torch.ones_like(v) for k, v in case.outer.items()}
    tangent = torch.func.jvp(lambda o: fresh()(o, episode)[0], (case.outer,), (direction,))[1]
    for got in (
        problems.grads_of(leaves),
        mf.hypergrad(fresh())(case.outer, episode)[0],
        torch.func.grad(lambda o: fresh()(o, episode)[0])(case.outer),
    ):
        # Rounding, amplified by 1 / sigma.
        assert_close(got, want, 1e-11)
    assert_close(tangent, flat(want).sum(), 1e-11)


def test_an_accuracy_has_the_gradient_of_its_smoothed_self():
    # L = [w > 0]: the smoothed gradient is the normal density at w / sigma, over sigma.
    def step(outer, episode):
        return (outer["w"] > 0).double().squeeze(), None

    w, sigma, pairs = 0.2, 0.5, 40_000
    loss = mf.algorithms.Evolution(step, sigma=sigma, pairs=pairs, generator=rng())
    got = estimate(loss, {"w": torch.tensor([w], dtype=F64)}, NONE)[0]["w"].item()
    want = math.exp(-0.5 * (w / sigma) ** 2) / math.sqrt(2 * math.pi) / sigma
    # A pair contributes |e| / (2 sigma) if |e| > w / sigma, else 0: second moment at most
    # 1 / (4 sigma^2) = 1.
    assert abs(got - want) < 3 * math.sqrt(1.0 / pairs)
    assert got > 0.5


def test_an_inner_problem_without_derivatives():
    # Inner: the cheapest of 41 candidates under a misclassification count, found by search; the
    # whole map is a staircase in the threshold. An estimator is a plain function here.
    grid = torch.linspace(-2, 2, 41, dtype=F64)

    def inner(fast, slow, x):
        wrong = ((x > fast["w"]) != (x > slow["t"])).double().mean()
        return wrong + 0.01 * fast["w"].abs().squeeze().round(decimals=1)

    def upper(fast, slow, target):
        return ((fast["w"] - target) ** 2).sum()

    def search(inner_loss, solver, start, outer, support):
        costs = torch.stack([problem.inner_loss({"w": w.reshape(1)}, outer, support) for w in grid])
        best = grid.index_select(0, costs.argmin().reshape(1))
        return mf.Solution({"w": best}, costs.min().reshape(1))

    problem = mf.Problem(inner, upper, init=lambda slow, support: {"w": torch.zeros(1, dtype=F64)})
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, steps=1), estimator=search)
    outer = {"t": torch.tensor([0.3], dtype=F64)}
    episode = mf.Episode(torch.linspace(-2, 2, 200, dtype=F64), torch.tensor([1.0], dtype=F64))
    assert mf.hypergrad(meta)(outer, episode)[0]["t"].item() == 0, "no derivative of its own"

    sigma, pairs = 0.2, 4000
    got = estimate(
        mf.algorithms.Evolution(meta, sigma=sigma, pairs=pairs, generator=rng()), outer, episode
    )[0]["t"].item()
    # The smoothed gradient by quadrature: E L(t + sigma e) e / sigma.
    e = torch.linspace(-6, 6, 4001, dtype=F64)
    losses = torch.func.vmap(lambda x: meta({"t": outer["t"] + sigma * x}, episode)[0])(e)
    density = torch.exp(-(e**2) / 2) / math.sqrt(2 * math.pi)
    want = torch.trapezoid(losses * e * density, e).item() / sigma
    second = torch.trapezoid(((losses - losses.flip(0)) / (2 * sigma) * e) ** 2 * density, e).item()
    assert abs(got - want) < 3 * math.sqrt((second - want**2) / pairs)
    # It points to where the best candidate is 1: to a larger threshold.
    assert got < -0.5


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_random_numbers_of_the_loss_are_common_to_all_perturbations(chunk_size):
    outer, episode = linear_case()

    def noisy(outer, episode):
        loss, aux = linear(outer, episode)
        return loss + 1e3 * torch.randn((), dtype=F64), aux

    def grads(meta):
        loss = mf.algorithms.Evolution(
            meta, sigma=0.1, pairs=6, generator=rng(), chunk_size=chunk_size
        )
        return estimate(loss, outer, episode)

    # Independent draws would change the estimate by 1e4; common ones leave rounding at 1e3.
    assert_close(grads(noisy)[0], grads(linear)[0], 1e-10)
    # And the next call draws others.
    assert grads(noisy)[1] != grads(noisy)[1]


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_perturbed_losses_see_the_draws_of_the_value(chunk_size):
    # A random linear loss: its estimate belongs to the coefficients that the value was made of,
    # also when the pairs run in several chunks.
    outer = {"a": torch.tensor([1.0, -2.0, 0.5], dtype=F64)}

    def random(outer, episode):
        c = torch.randn(3, dtype=F64)
        return (c * outer["a"]).sum(), c

    def fixed(outer, c):
        return (c * outer["a"]).sum(), None

    loss = mf.algorithms.Evolution(
        random, sigma=0.1, pairs=5, generator=rng(), chunk_size=chunk_size
    )
    got, value, c = estimate(loss, outer, NONE)
    same = mf.algorithms.Evolution(fixed, sigma=0.1, pairs=5, generator=rng())
    want, fixed_value, _ = estimate(same, outer, c)
    # Rounding, amplified by 1 / sigma.
    assert_close(got, want, 1e-12)
    assert_close(value, fixed_value, 1e-15)


def test_the_generator_is_the_only_source_and_moves_on():
    outer, episode = linear_case()
    generator = rng()
    loss = mf.algorithms.Evolution(linear, sigma=0.1, pairs=4, generator=generator)
    torch.manual_seed(1)
    first = estimate(loss, outer, episode)[0]
    second = estimate(loss, outer, episode)[0]
    torch.manual_seed(2)
    again = estimate(
        mf.algorithms.Evolution(linear, sigma=0.1, pairs=4, generator=rng()), outer, episode
    )[0]
    assert torch.equal(flat(first), flat(again))
    assert not torch.equal(flat(first), flat(second))


def test_over_tasks_inside_and_outside():
    case, meta = bilevel_case(steps=2)
    outside = mf.algorithms.Evolution(mf.over_tasks(meta), sigma=0.1, pairs=5, generator=rng(2))
    got = estimate(outside, case.outer, case.episodes)[0]
    each = [by_hand(meta, case.outer, case.episode(i), 0.1, 5, rng(2)) for i in range(2)]
    want = {k: (each[0][k] + each[1][k]) / 2 for k in case.outer}
    assert_close(got, want, 1e-11)
    inside = mf.over_tasks(
        mf.algorithms.Evolution(meta, sigma=0.1, pairs=5, generator=rng(2)), randomness="same"
    )
    assert_close(estimate(inside, case.outer, case.episodes)[0], want, 1e-11)
    with pytest.raises(mf.errors.TransformError, match="randomness="):
        mf.over_tasks(mf.algorithms.Evolution(meta, sigma=0.1, pairs=5, generator=rng()))(
            case.outer, case.episodes
        )


def test_the_second_derivative_is_zero():
    outer, episode = linear_case()
    loss = mf.algorithms.Evolution(linear, sigma=0.1, pairs=4, generator=rng())

    def slope(outer):
        return sum(
            (g**2).sum() for g in torch.func.grad(lambda o: loss(o, episode)[0])(outer).values()
        )

    assert flat(torch.func.grad(slope)(outer)).abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma must be positive, got 0.0"),
        ({"sigma": -1.0}, "sigma must be positive, got -1.0"),
        ({"sigma": float("nan")}, "sigma must be positive, got nan"),
        ({"pairs": 0}, "pairs must be an integer >= 1, got 0"),
        ({"pairs": 2.5}, "pairs must be an integer >= 1, got 2.5"),
        ({"chunk_size": 0}, "chunk_size must be an integer >= 1, got 0"),
        ({"generator": None}, "generator must be a torch.Generator, got NoneType"),
        ({"generator": 3}, "manual_seed"),
    ],
)
def test_wrong_arguments(change, message):
    settings = {"sigma": 0.1, "pairs": 2, "generator": rng()} | change
    with pytest.raises(ValueError, match=message):
        mf.algorithms.Evolution(linear, **settings)


def test_wrong_inputs():
    loss = mf.algorithms.Evolution(linear, sigma=0.1, pairs=2, generator=rng())
    with pytest.raises(mf.errors.ProblemError, match=r"outer=\{\} with Evolution"):
        loss({}, NONE)
    with pytest.raises(mf.errors.ProblemError, match="int64"):
        loss({"a": torch.ones(2, dtype=torch.int64)}, NONE)

    def vector(outer, episode):
        return outer["a"], None

    with pytest.raises(mf.errors.ProblemError, match="meta_loss must return a scalar"):
        mf.algorithms.Evolution(vector, sigma=0.1, pairs=2, generator=rng())(
            {"a": torch.ones(2)}, NONE
        )

    def log(outer, episode):
        return outer["a"].log().sum(), None

    cliff = mf.algorithms.Evolution(log, sigma=5.0, pairs=2, generator=rng())
    with pytest.raises(mf.errors.NonFiniteError, match=r"at [1-4] of 4 perturbed"):
        cliff({"a": torch.ones(1)}, NONE)
