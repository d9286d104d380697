"""`path=`: the outer loss after every step, under every estimator and way to differentiate."""

from __future__ import annotations

import dataclasses
import functools

import loops
import numpy as np
import pytest
import torch
from loops import PROBLEM, by_hand, hypergradient, slices, start, upper
from problems import assert_close, relative_error
from ways import ONE, STEPS, UNROLLED, WAYS, expected, tolerance

import metafocus as mf

CASE = loops.case()
FIXED = [0.1, 0.0, 0.7, -0.4]
"""Neither positive, nor of sum one: weights are used as they are."""


def total(first, outer, episode, weights, last=None, problem=PROBLEM):
    """The weighted outer losses after the steps of one episode, by hand."""
    path = by_hand(first, outer, slices(episode.support), last, problem.inner_loss)
    ends = zip(weights, path, slices(episode.query), strict=True)
    return sum(weight * upper(fast, outer, query) for weight, fast, query in ends)


@functools.cache
def wanted(last, kind):
    def value(outer, episode):
        weights = loops.learned_path(outer) if kind == "learned" else FIXED
        return total(start(outer, None), outer, episode, weights, last)

    episodes = [CASE.episode(i) for i in range(CASE.tasks)]
    return [hypergradient(CASE.outer, lambda o, e=e: value(o, e)) for e in episodes]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", UNROLLED)
def test_learned_weights(name, way):
    estimator, last = UNROLLED[name]
    meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator, path=loops.learned_path)
    assert_close(WAYS[way](meta, CASE), expected(wanted(last, "learned"), way), tolerance(name))


KINDS = {
    "list": FIXED,
    "tuple": tuple(FIXED),
    "tensor": torch.tensor(FIXED, dtype=torch.float64),
    "list of tensors": list(torch.tensor(FIXED, dtype=torch.float64)),
    "array": np.array(FIXED),
    "function that returns a list": lambda slow: FIXED,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["FirstOrder", "graph", "recompute=3", "forward"])
def test_fixed_weights(name, kind):
    estimator, last = UNROLLED[name]
    meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator, path=KINDS[kind])
    assert_close(WAYS["backward"](meta, CASE), wanted(last, "fixed")[0], tolerance(name))


def test_a_weight_of_one_at_the_end_is_the_loss_without_a_path():
    episode = CASE.episode()
    for estimator in (mf.FirstOrder(), mf.Unrolled(), mf.Unrolled(recompute=2)):
        plain = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator)
        path = [0.0] * (STEPS - 1) + [1.0]
        weighed = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator, path=path)
        one, other = (mf.hypergrad(m)(CASE.outer, episode)[0] for m in (plain, weighed))
        assert_close(other, one, 1e-14)


def test_weights_that_are_tensors_of_their_own_get_a_gradient():
    """Learned weights that are not in `outer` ride on the tape, as anything else does."""
    episode = CASE.episode()
    for name in ("FirstOrder", "graph", "recompute", "forward"):
        estimator, last = UNROLLED[name]
        weights = torch.tensor(FIXED, dtype=torch.float64, requires_grad=True)
        meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator, path=weights)
        meta(CASE.outer, episode)[0].backward()
        leaves = _leaves()
        path = by_hand(start(leaves, None), leaves, slices(episode.support), last)
        values = [
            upper(fast, CASE.outer, q) for fast, q in zip(path, slices(episode.query), strict=True)
        ]
        assert_close(weights.grad, torch.stack(values).detach(), tolerance(name))


def _leaves():
    return {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}


@pytest.mark.parametrize("name", ["FirstOrder", "graph", "last=2", "recompute=3", "forward"])
def test_the_start_of_the_path_is_tied_where_init_depends_on_the_support(name):
    """Every iterate of the truncated part moves with the start, whatever `init` is."""

    def generated(slow, support):
        # A start that sees the support: the stream itself.
        x, y, _ = support.at(0)
        return {"w1": slow["w1"] + 0.1 * x[:3, :2], "w2": slow["w2"] * y.mean()}

    problem = dataclasses.replace(PROBLEM, init=generated)
    estimator, last = UNROLLED[name]
    meta = mf.bilevel(problem, solver=loops.solver(), estimator=estimator, path=FIXED)
    episode = CASE.episode()
    want = hypergradient(
        CASE.outer, lambda o: total(generated(o, episode.support), o, episode, FIXED, last)
    )
    for way in ONE:
        assert_close(ONE[way](meta, CASE), want, tolerance(name))


# --- EvoGrad ------------------------------------------------------------------------------------


def evolved(first, outer, episode, weights, generator, sigma=0.3, temperature=0.5):
    """EvoGrad after each step by hand; the draws are made in the order of steps and copies."""
    path = by_hand(first, outer, slices(episode.support), 0)
    value = 0.0
    ends = zip(weights, path, slices(episode.support), slices(episode.query), strict=True)
    for weight, centre, batch, query in ends:
        copies = [
            {
                k: v + sigma * torch.randn(v.shape, generator=generator, dtype=v.dtype)
                for k, v in centre.items()
            }
            for _ in range(3)
        ]
        fits = torch.stack([loops.inner(c, outer, batch) for c in copies])
        share = torch.softmax(-fits / temperature, 0)
        fast = {k: sum(s * c[k] for s, c in zip(share, copies, strict=True)) for k in centre}
        value = value + weight * upper(fast, outer, query)
    return value


@pytest.mark.parametrize("way", ["backward", "hypergrad", "func.grad", "backward(loop)"])
def test_evograd_judges_the_copies_of_each_step_on_its_own_data(way):
    estimator = mf.EvoGrad(
        0.3, copies=3, temperature=0.5, generator=torch.Generator().manual_seed(7)
    )
    meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator, path=FIXED)
    generator = torch.Generator().manual_seed(7)
    tasks = 1 if way in ONE else CASE.tasks
    found = [
        hypergradient(
            CASE.outer,
            lambda o, i=i: evolved(start(o, None), o, CASE.episode(i), FIXED, generator),
        )
        for i in range(tasks)
    ]
    assert_close(WAYS[way](meta, CASE), expected(found, way), 1e-11)


# --- adapt and Solution.path --------------------------------------------------------------------

PATHS = [(), (0,), (STEPS - 1,), (0, 2), tuple(range(STEPS))]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_adapt_returns_the_fast_weights_after_the_steps_that_are_asked_for(path):
    episode = CASE.episode()
    got = mf.adapt(PROBLEM, CASE.outer, episode.support, solver=loops.solver(), path=path)
    steps = by_hand(start(_leaves(), None), _leaves(), slices(episode.support))
    assert len(got.path) == len(path)
    for step, fast in zip(path, got.path, strict=True):
        assert_close(fast, loops.constants(steps[step]), 1e-13)
        assert not any(v.requires_grad for v in fast.values())
    assert_close(got.params, loops.constants(steps[-1]), 1e-13)
    assert got.losses.shape == (STEPS,)


@pytest.mark.parametrize("path", PATHS[1:], ids=str)
@pytest.mark.parametrize("name", UNROLLED)
def test_an_estimator_called_by_hand_returns_the_same_path(name, path):
    estimator, last = UNROLLED[name]
    episode, outer = CASE.episode(), _leaves()
    first = start(outer, None)
    found = estimator(loops.inner, loops.solver(), first, outer, episode.support, path=path)
    steps = by_hand(first, outer, slices(episode.support), last)
    for step, fast in zip(path, found.path, strict=True):
        assert_close(fast, steps[step], 1e-13)
    assert_close(found.params, steps[-1], 1e-13)


def test_the_path_is_in_the_order_in_which_it_is_asked_for():
    episode = CASE.episode()
    for path in ((3, 1), (2, 2)):
        got = mf.adapt(PROBLEM, CASE.outer, episode.support, solver=loops.solver(), path=path)
        every = mf.adapt(
            PROBLEM, CASE.outer, episode.support, solver=loops.solver(), path=range(STEPS)
        )
        for step, fast in zip(path, got.path, strict=True):
            assert relative_error(fast, every.path[step]) == 0


@pytest.mark.parametrize("path", [(STEPS,), (-1,), (0, STEPS + 3)], ids=str)
def test_steps_that_the_loop_does_not_take_are_refused(path):
    episode = CASE.episode()
    with pytest.raises(mf.errors.ProblemError, match=rf"path.*step {max(path, key=abs)}"):
        mf.adapt(PROBLEM, CASE.outer, episode.support, solver=loops.solver(), path=path)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [[1.0] * (STEPS - 1), torch.ones(STEPS + 1), torch.ones(STEPS, 2), torch.tensor(1.0), [], 0.5],
    ids=str,
)
def test_another_number_of_weights_is_refused(path):
    with pytest.raises(mf.errors.ProblemError, match=f"path.*{STEPS}"):
        meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=mf.Unrolled(), path=path)
        meta(CASE.outer, CASE.episode())


SOLUTION_ONLY = {
    "Implicit": mf.Implicit(),
    "FixedPoint": mf.FixedPoint(lambda fast, slow, data: fast),
    "OneStep": mf.OneStep(lambda fast, slow, data: fast),
    "Penalty": mf.Penalty(10.0),
}


@pytest.mark.parametrize("name", SOLUTION_ONLY)
def test_an_estimator_without_a_path_is_refused_by_name(name):
    with pytest.raises(mf.errors.ProblemError, match=f"path= needs.*{name}"):
        mf.bilevel(PROBLEM, solver=loops.solver(), estimator=SOLUTION_ONLY[name], path=FIXED)


def test_a_given_solution_has_no_path():
    solver = mf.Given(lambda slow, support: {})
    with pytest.raises(mf.errors.ProblemError, match=r"path= needs inner steps.*Given"):
        mf.bilevel(PROBLEM, solver=solver, estimator=mf.EvoGrad(0.1), path=[1.0])


def without(inner_loss, solver, start, outer, support):
    return mf.FirstOrder()(inner_loss, solver, start, outer, support)


def with_path(inner_loss, solver, start, outer, support, *, path=()):
    return mf.FirstOrder()(inner_loss, solver, start, outer, support, path=path)


def with_anything(*args, **keywords):
    return mf.FirstOrder()(*args, **keywords)


def forgetful(inner_loss, solver, start, outer, support, *, path=()):
    """Takes the keyword and returns a path of another length."""
    return mf.FirstOrder()(inner_loss, solver, start, outer, support, path=path[1:])


def test_a_function_without_the_keyword_is_refused_by_name_and_works_without_a_path():
    with pytest.raises(mf.errors.ProblemError, match=r"path= needs.*without.*no keyword path"):
        mf.bilevel(PROBLEM, solver=loops.solver(), estimator=without, path=FIXED)
    meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=without)
    plain = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=mf.FirstOrder())
    assert_close(ONE["hypergrad"](meta, CASE), ONE["hypergrad"](plain, CASE), 0.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("estimator", [with_path, with_anything])
def test_a_function_with_the_keyword_stands_where_a_class_does(estimator, way):
    meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator, path=loops.learned_path)
    assert_close(WAYS[way](meta, CASE), expected(wanted(0, "learned"), way), 1e-11)


def test_a_path_of_another_length_than_asked_for_is_refused():
    meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=forgetful, path=FIXED)
    with pytest.raises(mf.errors.ProblemError, match=r"forgetful.*4 steps.*path of 3"):
        meta(CASE.outer, CASE.episode())


@pytest.mark.parametrize("name", ["FirstOrder", "graph", "recompute", "EvoGrad"])
def test_a_path_where_nothing_adapts_is_refused(name):
    estimator = mf.EvoGrad(0.1) if name == "EvoGrad" else UNROLLED[name][0]
    problem = mf.Problem(lambda f, s, d: d.sum(), lambda f, s, d: s["w"] * d.sum(), lambda s, d: {})
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=estimator, path=[0.5, 0.5])
    with pytest.raises(mf.errors.ProblemError, match="path"):
        meta({"w": torch.ones(())}, mf.Episode(torch.ones(2), torch.ones(2)))


# --- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True, 2, 3, 9])
def test_windows_weigh_their_own_steps(recompute):
    """Two windows of three steps: each is differentiated from where it begins."""
    case = loops.case(tasks=1, steps=6)
    episode, weights = case.episode(), [0.2, -0.1, 0.9]
    windows = mf.algorithms.Windows(
        PROBLEM, solver=loops.solver(3), recompute=recompute, path=weights
    )
    window = windows.init(case.outer, episode.support)
    leaves = {k: v.clone().requires_grad_() for k, v in case.outer.items()}
    for number in range(2):
        at = window
        loss, (window, aux) = windows.loss(leaves, window, episode)
        got = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        got = {
            k: torch.zeros_like(v) if g is None else g
            for (k, v), g in zip(leaves.items(), got, strict=True)
        }
        want = hypergradient(
            case.outer, lambda o, at=at, n=number: _window(o, at, episode, n, weights)
        )
        assert_close(got, want, 1e-11)
        assert aux.inner_losses.shape == (3,)


def _window(outer, window, episode, number, weights):
    """The loss of one window by hand, from where it begins."""
    fast, velocity = window.fast, window.solver_state
    if number == 0:
        fast = start(outer, None)
    value = 0.0
    for t in range(3 * number, 3 * number + 3):
        batch, query = slices(episode.support)[t], slices(episode.query)[t]
        leaves = {k: v if v.requires_grad else v.clone().requires_grad_() for k, v in fast.items()}
        found = torch.autograd.grad(
            loops.inner(leaves, outer, batch), list(leaves.values()), create_graph=True
        )
        pairs = zip(leaves, found, strict=True)
        velocity = {k: loops.MOMENTUM * velocity[k] + g for k, g in pairs}
        fast = {k: v - loops.rate(outer) * velocity[k] for k, v in leaves.items()}
        value = value + weights[t - 3 * number] * upper(fast, outer, query)
    return value


def test_windows_take_learned_weights_in_transforms():
    case = loops.case(tasks=3, steps=STEPS)
    windows = mf.algorithms.Windows(
        PROBLEM, solver=loops.solver(), path=loops.learned_path, recompute=True
    )
    window = windows.init(case.outer, case.episode().support)

    def one(outer, episode):
        return windows.loss(outer, window, episode)[0]

    per_task = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(case.outer, case.episodes)
    got = {k: v.mean(0) for k, v in per_task.items()}
    assert_close(got, expected(wanted(None, "learned"), "vmap(grad)"), 1e-11)
