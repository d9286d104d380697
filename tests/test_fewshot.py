"""The sinusoid generator, and the recipes of few-shot learning against methods written by hand."""

from __future__ import annotations

import math

import pytest
import torch
from problems import assert_close

import metafocus as mf
from metafocus.errors import ProblemError
from metafocus.recipes import fewshot

pytestmark = pytest.mark.usefixtures("float64")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the generator --------------------------------------------------------------------------------


def amplitude_and_phase(x, y):
    """Fit `y = a sin(x - p)` with frequency 1: linear in `(a cos p, a sin p)`."""
    basis = torch.cat([x.sin(), -x.cos()], -1)
    fit = torch.linalg.lstsq(basis, y).solution
    residual = (basis @ fit - y).abs().max()
    return fit.squeeze(-1).norm(dim=-1), torch.atan2(fit[:, 1, 0], fit[:, 0, 0]), residual


def assert_uniform(values, low, high):
    """Kolmogorov and Smirnov, at a chance of 1e-6 for a false alarm; and all moments' ends."""
    unit = (values.flatten().sort().values - low) / (high - low)
    assert -1e-9 <= unit.min() and unit.max() <= 1 + 1e-9
    count = len(unit)
    steps = torch.arange(count + 1) / count
    distance = torch.maximum((steps[1:] - unit).max(), (unit - steps[:-1]).max())
    assert distance < math.sqrt(math.log(2 / 1e-6) / 2 / count)


def test_tasks_are_sinusoids_with_the_amplitudes_and_phases_of_the_paper():
    tasks = 4000
    (x, y), (xq, yq) = fewshot.sinusoids(tasks, 10, 15, generator=seeded())
    assert x.shape == y.shape == (tasks, 10, 1) and xq.shape == yq.shape == (tasks, 15, 1)
    amplitude, phase, residual = amplitude_and_phase(x, y)
    # Two numbers explain every point, at frequency 1; rounding of least squares.
    assert residual < 1e-9
    assert_uniform(amplitude, 0.1, 5.0)
    assert_uniform(phase, 0.0, math.pi)
    correlation = torch.corrcoef(torch.stack([amplitude, phase]))[0, 1]
    assert correlation.abs() < 5 / math.sqrt(tasks)
    # The query is of the same task.
    assert (amplitude[:, None, None] * (xq - phase[:, None, None]).sin() - yq).abs().max() < 1e-8


def test_points_are_uniform_and_new_for_each_task_and_part():
    (x, _), (xq, _) = fewshot.sinusoids(2000, 10, 10, generator=seeded(1))
    assert_uniform(x, -5.0, 5.0)
    assert_uniform(xq, -5.0, 5.0)
    everything = torch.cat([x, xq], 1).flatten()
    assert everything.unique().numel() == everything.numel()


def test_every_call_draws_new_tasks():
    g = seeded(2)
    first, second = (fewshot.sinusoids(50, 5, 5, generator=g) for _ in range(2))
    found = [amplitude_and_phase(*episode.support)[:2] for episode in (first, second)]
    both = torch.cat([torch.stack(pair, 1) for pair in found])
    # No pool: all 100 amplitudes and phases differ, and so do the points.
    distances = torch.pdist(both)
    assert distances.min() > 1e-6
    assert not torch.isclose(first.support[0], second.support[0]).any()


def test_tasks_repeat_with_their_generator_and_leave_the_global_one_alone():
    torch.manual_seed(0)
    a = fewshot.sinusoids(3, 4, 5, generator=seeded(7))
    state = torch.get_rng_state()
    torch.manual_seed(123)
    b = fewshot.sinusoids(3, 4, 5, generator=seeded(7))
    c = fewshot.sinusoids(3, 4, 5, generator=seeded(8))
    for one, same, other in zip(sum(a, ()), sum(b, ()), sum(c, ()), strict=True):
        assert torch.equal(one, same) and not torch.isclose(one, other).any()
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_dtype_and_numbers_out_of_range():
    assert fewshot.sinusoids(2, 3, 4, generator=seeded()).query[1].dtype == torch.float64
    episodes = fewshot.sinusoids(2, 3, 4, generator=seeded(), dtype=torch.float32)
    assert {v.dtype for part in episodes for v in part} == {torch.float32}
    for bad in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match=r"must be an integer >= 1, got 0"):
            fewshot.sinusoids(*bad, generator=seeded())


# --- the methods, by hand -------------------------------------------------------------------------

LR, STEPS = 0.05, 3


def predict(params, x):
    return torch.tanh(x @ params["w1"].mT + params["b1"]) @ params["w2"].mT + params["b2"]


def loss(params, data):
    x, y = data
    return ((predict(params, x) - y) ** 2).mean()


def start():
    g = seeded(3)
    shapes = {"w1": (6, 1), "b1": (6,), "w2": (1, 6), "b2": (1,)}
    return {k: torch.randn(s, generator=g) / 2 for k, s in shapes.items()}


def episode():
    drawn = fewshot.sinusoids(1, 5, 7, generator=seeded(4))
    return mf.Episode(*(tuple(v[0] for v in part) for part in drawn))


def hypergrad(problem, outer, *, solver=None, estimator=None):
    meta = mf.bilevel(
        problem, solver=solver or mf.SGD(LR, STEPS), estimator=estimator or mf.Unrolled()
    )
    return mf.hypergrad(meta)(outer, episode())


def by_hand(outer, adapts, rate=lambda leaves, k: LR, steps=STEPS, detach=False):
    """Inner steps and the derivative of the query loss, on the plain tape."""
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    fast = {k: leaves[k] for k in leaves if not k.startswith("lr.")}
    support, query = episode()
    for _ in range(steps):
        grads = torch.autograd.grad(
            loss(fast, support), [fast[k] for k in adapts], create_graph=True
        )
        for k, g in zip(adapts, grads, strict=True):
            fast[k] = fast[k] - rate(leaves, k) * (g.detach() if detach else g)
    value = loss(fast, query)
    found = torch.autograd.grad(value, list(leaves.values()))
    return dict(zip(leaves, found, strict=True)), value, fast


@pytest.mark.parametrize("first_order", [False, True])
def test_maml(first_order):
    outer = start()
    estimator = mf.FirstOrder() if first_order else mf.Unrolled()
    grads, (value, _) = hypergrad(fewshot.maml(loss), outer, estimator=estimator)
    want, exact, _ = by_hand(outer, list(outer), detach=first_order)
    assert_close(grads, want, 1e-13)
    assert_close(value, exact.detach(), 1e-13)
    # The two orders differ, so the test can tell them apart.
    other, _, _ = by_hand(outer, list(outer), detach=not first_order)
    assert (other["w1"] - want["w1"]).norm() > 1e-2 * want["w1"].norm()


def test_anil_adapts_the_head_and_learns_everything():
    outer, head = start(), ("w2", "b2")
    grads, (_, aux) = hypergrad(fewshot.anil(loss, head), outer)
    want, _, fast = by_hand(outer, head)
    assert set(aux.params) == set(head)
    assert_close(aux.params, {k: fast[k].detach() for k in head}, 1e-13)
    assert_close(grads, want, 1e-13)
    assert all(v.any() for v in grads.values())


def test_meta_sgd_learns_a_rate_for_each_weight():
    outer = fewshot.with_rates(start(), LR)
    assert set(fewshot.learned_rates(outer)) == set(start())
    outer["lr.w1"] = outer["lr.w1"] * torch.arange(1, 7)[:, None]
    solver = mf.SGD(fewshot.learned_rates, steps=1)
    grads, (_, aux) = hypergrad(fewshot.meta_sgd(loss), outer, solver=solver)
    want, _, _ = by_hand(outer, list(start()), lambda leaves, k: leaves[f"lr.{k}"], steps=1)
    assert set(aux.params) == set(start())
    assert_close(grads, want, 1e-13)
    assert grads["lr.w1"].abs().min() > 0


def test_imaml_solves_the_proximal_problem():
    outer = start()
    solver = mf.SGD(0.05, 800)
    grads, (_, aux) = hypergrad(
        fewshot.imaml(loss, 2.0), outer, solver=solver, estimator=mf.Implicit(mf.Dense())
    )
    support, query = episode()
    pulled = torch.func.grad(
        lambda f: loss(f, support) + sum(((f[k] - outer[k]) ** 2).sum() for k in f)
    )
    assert all(g.abs().max() < 1e-12 for g in pulled(aux.params).values())
    # (1 + H / strength)^-1 grad L_query at the solution, theorem 1 of the paper.
    names = list(outer)
    flat = torch.cat([aux.params[k].flatten() for k in names])

    def of(f, data):
        parts = f.split([outer[k].numel() for k in names])
        return loss({k: p.view_as(outer[k]) for k, p in zip(names, parts, strict=True)}, data)

    hessian = torch.func.hessian(of)(flat, support)
    want = torch.linalg.solve(
        torch.eye(len(flat)) + hessian / 2.0, torch.func.grad(of)(flat, query)
    )
    assert_close(torch.cat([grads[k].flatten() for k in names]), want, 1e-9)
    with pytest.raises(ValueError, match="strength"):
        fewshot.imaml(loss, -1.0)


def test_reptile_is_a_step_towards_the_adapted_weights():
    outer, rate = start(), 0.25
    episodes = fewshot.sinusoids(4, 5, 7, generator=seeded(5))
    solver = mf.SGD(LR, STEPS)
    meta = mf.over_tasks(
        mf.bilevel(fewshot.reptile(loss), solver=solver, estimator=mf.FirstOrder())
    )
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    optimizer = torch.optim.SGD(leaves.values(), rate)
    value, _ = meta(leaves, episodes)
    value.backward()
    optimizer.step()
    adapted = []
    for i in range(4):
        support = tuple(v[i] for v in episodes.support)
        fast = {k: v.clone() for k, v in outer.items()}
        for _ in range(STEPS):
            grads = torch.func.grad(loss)(fast, support)
            fast = {k: v - LR * grads[k] for k, v in fast.items()}
        adapted.append(fast)
    for k, v in outer.items():
        mean = torch.stack([fast[k] for fast in adapted]).mean(0)
        assert_close(leaves[k].detach(), v + rate * (mean - v), 1e-13)
    distance = sum(((fast[k] - outer[k]) ** 2).sum() / 2 for fast in adapted for k in outer) / 4
    assert_close(value.detach(), distance, 1e-13)


@pytest.mark.parametrize("way", ["hypergrad", "torch.func.grad"])
@pytest.mark.parametrize(
    "estimator", [mf.FirstOrder(), mf.Unrolled(), mf.Unrolled(recompute=True)], ids=str
)
def test_reptile_is_the_same_with_every_estimator_and_never_a_derivative(estimator, way):
    outer = start()
    meta = mf.bilevel(fewshot.reptile(loss), solver=mf.SGD(LR, STEPS), estimator=estimator)
    support, _ = episode()
    data = mf.Episode(support, None)
    if way == "hypergrad":
        grads, (_, aux) = mf.hypergrad(meta)(outer, data)
    else:
        grads, aux = torch.func.grad(meta, has_aux=True)(outer, data)
    assert_close(grads, {k: v - aux.params[k] for k, v in outer.items()}, 1e-14)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [fewshot.maml(loss), fewshot.imaml(loss), fewshot.reptile(loss), fewshot.anil(loss, ("w2",))],
    ids=["maml", "imaml", "reptile", "anil"],
)
def test_an_empty_outer_is_refused(problem):
    with pytest.raises(ProblemError, match="outer"):
        hypergrad(problem, {})


def test_a_head_that_does_not_exist_is_refused():
    with pytest.raises(ProblemError, match=r"head names 'w9'; outer holds \['b1'"):
        hypergrad(fewshot.anil(loss, ("w2", "w9")), start())
    for bad in ((), "w2"):
        with pytest.raises(ValueError, match="head must be a tuple"):
            fewshot.anil(loss, bad)


def test_meta_sgd_without_rates_is_refused():
    with pytest.raises(ProblemError, match="with_rates"):
        hypergrad(fewshot.meta_sgd(loss), start())


@pytest.mark.parametrize("method", ["maml", "anil"])
def test_names_that_a_module_ignores_are_refused(method):
    """`functional_call` says nothing to an unknown name; the weight would never adapt."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))

    def called(params, data):
        return ((torch.func.functional_call(net, params, data[0]) - data[1]) ** 2).mean()

    outer = {k: v.detach() for k, v in net.named_parameters()}
    outer["2.wieght"] = outer.pop("2.weight")
    head = ("2.wieght", "2.bias")
    problem = fewshot.maml(called) if method == "maml" else fewshot.anil(called, head)
    with pytest.raises(ProblemError, match=r"2\.wieght"):
        hypergrad(problem, outer)


def test_diverging_of_one_episode_and_of_many():
    def aux(*losses):
        return mf.Aux({}, torch.tensor(losses))

    assert fewshot.diverging(aux(1.0, 2.0)).item() is True
    assert fewshot.diverging(aux(2.0, 3.0, 2.0)).item() is False
    assert fewshot.diverging(aux(1.0)).item() is False
    table = aux([1.0, 0.5], [1.0, math.inf], [math.nan, math.nan], [0.0, 0.0])
    assert fewshot.diverging(table).tolist() == [False, True, True, False]
    assert fewshot.diverging(mf.Aux({}, torch.zeros(4, 0))).tolist() == [False] * 4
