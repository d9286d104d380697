"""The nouns of the engine: problems, starts, metrics, and solvers with a rule of their own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import loops
import numpy as np
import pytest
import torch
from loops import PROBLEM, by_hand, hypergradient, slices, start, upper
from problems import assert_close, relative_error
from torch import Tensor, nn
from ways import ONE, STEPS, UNROLLED, WAYS, expected, tolerance

import metafocus as mf

CASE = loops.case()


def value(outer, episode, last=None, init=start, loss=loops.inner):
    path = by_hand(init(outer, episode.support), outer, slices(episode.support), last, loss)
    return upper(path[-1], outer, slices(episode.query)[-1])


@functools.cache
def wanted(last, init=start, loss=loops.inner):
    episodes = [CASE.episode(i) for i in range(CASE.tasks)]
    return [
        hypergradient(CASE.outer, lambda o, e=e: value(o, e, last, init, loss)) for e in episodes
    ]


# --- problem: four functions --------------------------------------------------------------------


def keyword(slow, *, support):
    return slow


class Start:
    def __call__(self, slow, support):
        return start(slow, support)

    def method(self, slow, support):
        return start(slow, support)


INITS = {
    "function": start,
    "lambda": lambda slow, support: start(slow, support),
    "default": lambda slow, support=None: start(slow, support),
    "anything": lambda *args: start(*args),
    "partial": functools.partial(lambda extra, slow, support: start(slow, support), 3),
    "object": Start(),
    "method": Start().method,
}


@pytest.mark.parametrize("kind", INITS)
def test_init_is_any_function_of_two_arguments(kind):
    problem = dataclasses.replace(PROBLEM, init=INITS[kind])
    meta = mf.bilevel(problem, solver=loops.solver(), estimator=mf.Unrolled())
    assert_close(ONE["hypergrad"](meta, CASE), wanted(None)[0], 1e-11)


@pytest.mark.parametrize(
    "init",
    [lambda slow: slow, lambda: {}, lambda a, b, c: a, keyword],
    ids=["one", "none", "three", "keyword"],
)
def test_init_of_other_arguments_is_refused_with_the_new_form(init):
    with pytest.raises(mf.errors.ProblemError, match=r"init must take two.*lambda slow, support"):
        mf.Problem(loops.inner, upper, init)


@pytest.mark.parametrize("name", ["inner_loss", "outer_loss", "init"])
def test_what_is_no_function_is_refused(name):
    good = {"inner_loss": loops.inner, "outer_loss": upper, "init": start}
    for bad in (3, "loss", {"w": torch.zeros(1)}):
        with pytest.raises(mf.errors.ProblemError, match=f"{name} must be a function"):
            mf.Problem(**{**good, name: bad})


def generated(slow, support):
    """A start made from the support: the first batch, through the slow weights."""
    x, y, _ = support.at(0)
    return {
        "w1": slow["w1"] + 0.3 * torch.tanh(x.T @ x) @ slow["w1"],
        "w2": slow["w2"] * (1 + y.mean()),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", UNROLLED)
def test_a_start_that_sees_the_support(name, way):
    problem = dataclasses.replace(PROBLEM, init=generated)
    estimator, last = UNROLLED[name]
    meta = mf.bilevel(problem, solver=loops.solver(), estimator=estimator)
    want = expected(wanted(last, generated), way)
    assert_close(WAYS[way](meta, CASE), want, tolerance(name))


def test_a_start_that_sees_the_support_has_a_gradient_by_it():
    problem = dataclasses.replace(PROBLEM, init=generated)
    for name, (estimator, last) in UNROLLED.items():
        meta = mf.bilevel(problem, solver=loops.solver(), estimator=estimator)
        episode = CASE.episode()
        found = []
        for make in ("ours", "by hand"):
            x, y, index = (v.clone() for v in episode.support.tree)
            x.requires_grad_()
            one = mf.Episode(mf.PerStep((x, y, index)), episode.query)
            leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
            if make == "ours":
                meta(CASE.outer, one)[0].backward()
            else:
                value(leaves, one, last, generated).backward()
            found.append(x.grad)
        assert_close(*found, tolerance(name))


def test_adapt_and_windows_start_from_the_support():
    problem = dataclasses.replace(PROBLEM, init=generated)
    support = CASE.episode().support
    want = generated(CASE.outer, support)
    got = mf.adapt(problem, CASE.outer, support, solver=loops.solver(0))
    assert_close(got.params, want, 0.0)
    windows = mf.algorithms.Windows(problem, solver=loops.solver(1))
    assert_close(windows.init(CASE.outer, support).fast, want, 0.0)
    soba = mf.algorithms.SOBA(problem, inner_lr=0.1, v_lr=0.1)
    assert_close(soba.init(CASE.outer, support).fast, want, 0.0)


def test_the_start_sees_the_prepared_support_everywhere():
    def prepare(slow, episode):
        x, y, index = episode.support.tree
        return mf.Episode(mf.PerStep((2 * x, y, index)), episode.query)

    problem = mf.Problem(loops.inner, upper, generated, prepare)
    episode = CASE.episode()
    meta = mf.bilevel(problem, solver=loops.solver(), estimator=mf.Unrolled())
    windows = mf.algorithms.Windows(problem, solver=loops.solver())
    window = windows.init(CASE.outer, episode.support)
    want, (loss, _) = mf.hypergrad(meta)(CASE.outer, episode)
    got, (value, _) = torch.func.grad_and_value(windows.loss, has_aux=True)(
        CASE.outer, window, episode
    )
    assert_close(value, loss.detach(), 1e-14)
    assert_close(got, want, 1e-12)
    first = mf.adapt(problem, CASE.outer, episode.support, solver=loops.solver(0)).params
    assert_close(window.fast, first, 0.0)
    soba = mf.algorithms.SOBA(problem, inner_lr=0.1, v_lr=0.1)
    assert_close(soba.init(CASE.outer, episode.support).fast, first, 0.0)


# --- frozen parameters --------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    module[0].requires_grad_(False)
    return module


NET = net()
DATA = torch.randn(3, 5, 3, dtype=torch.float64), torch.randn(3, 5, 1, dtype=torch.float64)
TASKS = mf.Episode(DATA, tuple(x.flip(0) for x in DATA))
FREE, FROZEN = ["2.bias", "2.weight"], ["0.bias", "0.weight"]


def fit(fast, slow, data):
    x, y = data
    return ((torch.func.functional_call(NET, {**slow, **fast}, (x,)) - y) ** 2).mean()


def net_case() -> loops.Case:
    return loops.Case(mf.Problem(fit, fit), dict(NET.named_parameters()), TASKS)


EVERY = {
    "FirstOrder": mf.FirstOrder(),
    "graph": mf.Unrolled(),
    "last=1": mf.Unrolled(last=1),
    "recompute": mf.Unrolled(recompute=True),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "finite": mf.Unrolled(hvp=mf.hvp_finite()),
    "Implicit": mf.Implicit(mf.Dense()),
    "Penalty": mf.Penalty(10.0),
    "EvoGrad": mf.EvoGrad(0.1, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("name", EVERY)
def test_frozen_parameters_do_not_adapt_and_get_no_gradient(name):
    """With the default start; the same as if they were constants of the loss."""
    case = net_case()
    meta = mf.bilevel(case.problem, solver=mf.SGD(0.1, 2), estimator=EVERY[name])
    grads, (_, aux) = mf.hypergrad(meta)(case.outer, case.episode())
    assert sorted(aux.params) == FREE and list(grads) == list(case.outer)
    assert all((grads[k] == 0).all() for k in FROZEN)
    assert sorted(torch.func.grad(meta, has_aux=True)(case.outer, case.episode())[1].params) == FREE
    if name == "EvoGrad":
        return  # its draws differ from call to call
    constant = {k: v.detach() for k, v in case.outer.items() if k in FROZEN}
    alone = mf.Problem(
        lambda f, s, d: fit(f, {**s, **constant}, d), lambda f, s, d: fit(f, {**s, **constant}, d)
    )
    want = mf.hypergrad(mf.bilevel(alone, solver=mf.SGD(0.1, 2), estimator=EVERY[name]))(
        {k: case.outer[k] for k in reversed(FREE)}, case.episode()
    )[0]
    got = {k: grads[k] for k in want}
    # Finite differences choose their step by the norm of the fast weights: the same here.
    assert_close(got, want, 1e-12)
    per_task = torch.func.vmap(torch.func.grad(meta, has_aux=True), in_dims=(None, 0))
    many, aux = per_task(case.outer, case.episodes)
    assert sorted(aux.params) == FREE
    assert_close({k: many[k][0] for k in want}, want, 1e-10)
    nested, (_, aux) = mf.hypergrad(mf.over_tasks(meta))(case.outer, case.episodes)
    assert sorted(aux.params) == FREE and all((nested[k] == 0).all() for k in FROZEN)
    assert_close({k: nested[k] for k in want}, {k: many[k].mean(0) for k in want}, 1e-10)


def test_frozen_parameters_stay_frozen_outside_the_estimators():
    case, episode = net_case(), net_case().episode()
    assert (
        sorted(mf.adapt(case.problem, case.outer, episode.support, solver=mf.SGD(0.1, 2)).params)
        == FREE
    )
    windows = mf.algorithms.Windows(case.problem, solver=mf.SGD(0.1, 2))
    window = windows.init(case.outer, episode.support)
    assert sorted(window.fast) == FREE
    loss, (window, _) = windows.loss(case.outer, window, episode)
    loss.backward()
    assert sorted(window.fast) == FREE
    assert all(case.outer[k].grad is None for k in FROZEN)
    assert all(case.outer[k].grad is not None for k in FREE)
    NET.zero_grad()
    plain = mf.bilevel(case.problem, solver=mf.SGD(0.1, 2), estimator=mf.FirstOrder())
    generator = torch.Generator().manual_seed(0)
    algorithms = {
        "PES": mf.algorithms.PES(windows, sigma=0.1, pairs=2),
        "ESSingle": mf.algorithms.ESSingle(windows, sigma=0.1, pairs=2),
        "Evolution": mf.algorithms.Evolution(plain, sigma=0.1, pairs=2, generator=generator),
        "SOBA": mf.algorithms.SOBA(case.problem, inner_lr=0.1, v_lr=0.1),
        "AmIGO": mf.algorithms.AmIGO(case.problem, inner_lr=0.1, v_lr=0.1),
        "StocBiO": mf.algorithms.StocBiO(case.problem, inner_lr=0.1, v_lr=0.1),
        "BOME": mf.algorithms.BOME(case.problem, inner_lr=0.1, fast_lr=0.1),
        "F2SA": mf.algorithms.F2SA(case.problem, inner_lr=0.1, strength=10.0),
    }
    for name, algorithm in algorithms.items():
        options = {"generator": generator} if name in ("PES", "ESSingle") else {}
        state = algorithm.init(case.outer, episode.support)
        grads, state, aux = algorithm.step(case.outer, state, episode, **options)
        assert list(grads) == list(case.outer), name
        assert all((grads[k] == 0).all() for k in FROZEN), name
        fast = aux.params if name == "Evolution" else getattr(state, "fast", None)
        fast = state.window.fast if fast is None else fast
        assert sorted(fast) == FREE, name
    terms = mf.Episode(*TASKS)
    saba = mf.algorithms.SABA(case.problem, inner_lr=0.1, v_lr=0.1)
    state = saba.init(case.outer, terms)
    episode = mf.algorithms.draw(terms, generator=generator)
    grads, state, _ = saba.step(case.outer, state, episode)
    assert sorted(state.fast) == FREE and all((grads[k] == 0).all() for k in FROZEN)
    rows = mf.compare(
        case.problem,
        case.outer,
        net_case().episode(),
        solver=mf.SGD(0.1, 2),
        estimators={"exact": mf.Unrolled()},
        reference={
            k: g
            for k, g in mf.hypergrad(
                mf.bilevel(case.problem, solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())
            )(case.outer, net_case().episode())[0].items()
        },
    ).rows
    assert rows[0]["relative_error"] < 1e-13


def test_frozen_is_a_parameter_that_does_not_require_grad_and_nothing_else():
    w = torch.ones(2, dtype=torch.float64)
    frozen = nn.Parameter(w, requires_grad=False)
    assert list(mf.from_slow({"a": w, "b": nn.Parameter(w)}, None)) == ["a", "b"]
    assert list(mf.from_slow({"a": w, "b": frozen}, None)) == ["a"]
    # Under a transform, through the wrappers.
    seen = []
    torch.func.grad(lambda o: seen.append(list(mf.from_slow(o, None))) or o["a"].sum())(
        {"a": w, "b": frozen}
    )
    many = {"a": torch.stack([w, w]), "b": nn.Parameter(torch.stack([w, w]), requires_grad=False)}
    torch.func.vmap(lambda o: seen.append(list(mf.from_slow(o, None))) or o["a"])(many)
    assert seen == [["a"], ["a"]]


def test_a_start_of_ones_own_may_adapt_what_is_frozen():
    problem = mf.Problem(fit, fit, lambda slow, support: dict(slow))
    got = mf.adapt(problem, dict(NET.named_parameters()), TASKS.support, solver=mf.SGD(0.1, 2))
    assert sorted(got.params) == sorted(FREE + FROZEN)
    assert all(relative_error(got.params[k], NET.state_dict()[k]) > 1e-6 for k in FROZEN)


@pytest.mark.parametrize("outer", ["frozen", "empty"])
def test_nothing_left_to_adapt_is_refused(outer):
    frozen = {k: nn.Parameter(v.detach(), False) for k, v in NET.named_parameters()}
    params, why = (frozen, "frozen") if outer == "frozen" else ({}, r"outer=\{\} holds no")
    meta = mf.bilevel(mf.Problem(fit, fit), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())
    for run in (meta, mf.hypergrad(meta)):
        with pytest.raises(mf.errors.ProblemError, match=f"Nothing is left to adapt.*{why}"):
            run(params, net_case().episode())


# --- trainable, stack_episodes ------------------------------------------------------------------


def test_trainable_parameters_tied_ones_once():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    module["b"].weight = module["a"].weight
    module["c"].requires_grad_(False)
    got = mf.trainable(module)
    assert list(got) == ["a.weight", "a.bias", "b.bias"]
    assert all(got[k] is dict(module.named_parameters())[k] for k in got)
    assert mf.trainable(module["c"]) == {}


def test_stacked_episodes():
    parts = [((torch.full((2,), i), {"n": 3}), torch.tensor(float(i))) for i in range(3)]
    got = mf.stack_episodes(parts)
    assert isinstance(got, mf.Episode) and got.support[1] == {"n": 3}
    assert got.support[0].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert got.query.tolist() == [0.0, 1.0, 2.0]
    mixed = mf.stack_episodes([parts[0], mf.Episode(*parts[1]), list(parts[2])])
    assert torch.equal(mixed.query, got.query)


ONE_TASK = (torch.zeros(2), torch.zeros(3))
UNEQUAL = {
    "none": ([], "episodes is empty"),
    "shapes": ([ONE_TASK, (torch.zeros(2), torch.zeros(4))], "cannot be stacked.*Pad"),
    "structure": (
        [ONE_TASK, ((torch.zeros(2),), torch.zeros(3))],
        "episode 1 has another structure",
    ),
    "names": (
        [({"a": torch.zeros(2)}, 1), ({"b": torch.zeros(2)}, 1)],
        "episode 1 has another structure",
    ),
    "numbers": ([(torch.zeros(2), 1), (torch.zeros(2), 2)], "different constants.*1"),
    "kinds": ([(torch.zeros(2), 1), (torch.zeros(2), torch.tensor(1))], "different constants.*1"),
    "others": ([(torch.zeros(2), torch.tensor(1)), (torch.zeros(2), 1)], "different constants"),
    "no pairs": ([torch.zeros(2, 3)], r"must be mf\.Episode"),
    "arrays": ([(torch.zeros(2), np.zeros(2)), (torch.zeros(2), np.ones(2))], "array.*tensors"),
}


@pytest.mark.parametrize("kind", UNEQUAL)
def test_episodes_that_do_not_fit_together_are_refused(kind):
    episodes, message = UNEQUAL[kind]
    with pytest.raises(mf.errors.ProblemError, match=message):
        mf.stack_episodes(episodes)


# --- metrics ------------------------------------------------------------------------------------


def measured(fast, slow, data):
    error = loops.predict(fast, data[0]) - data[1]
    return upper(fast, slow, data), {
        "each": error**2,
        "right": (error.abs() < 1).sum(),
        "rate": 0.25,
        "count": 5,
        "finite": True,
    }


MEASURED = dataclasses.replace(PROBLEM, outer_loss=measured)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", UNROLLED)
def test_metrics_change_no_gradient(name, way):
    estimator, last = UNROLLED[name]
    meta = mf.bilevel(MEASURED, solver=loops.solver(), estimator=estimator)
    assert_close(WAYS[way](meta, CASE), expected(wanted(last), way), tolerance(name))


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("path", [None, [0.25] * STEPS], ids=["last", "path"])
def test_metrics_are_those_of_the_last_step_and_constants(path):
    episode = CASE.episode()
    leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
    meta = mf.bilevel(MEASURED, solver=loops.solver(), estimator=mf.Unrolled(), path=path)
    for loss, aux in (
        meta(leaves, episode),
        mf.hypergrad(meta)(leaves, episode)[1],
        (None, torch.func.grad(meta, has_aux=True)(CASE.outer, episode)[1]),
    ):
        fast = by_hand(start(leaves, None), leaves, slices(episode.support))[-1]
        want = measured(fast, leaves, slices(episode.query)[-1])[1]
        assert list(aux.metrics) == list(want)
        for k, got in aux.metrics.items():
            assert isinstance(got, Tensor) and not got.requires_grad
            torch.testing.assert_close(got, torch.as_tensor(want[k]).detach())
        assert loss is None or loss.requires_grad
    # As the loss is used, the metrics do not keep its graph.
    assert (
        mf.bilevel(PROBLEM, solver=loops.solver(), estimator=mf.Unrolled())(leaves, episode)[
            1
        ].metrics
        == {}
    )


BAD = {
    "list": (lambda loss: [loss, {}], "outer_loss must return a scalar tensor, got list"),
    "three": (lambda loss: (loss, {}, {}), "scalar, metrics"),
    "no dict": (lambda loss: (loss, loss), "scalar, metrics"),
    "loss of shape": (lambda loss: (loss.reshape(1), {}), r"outer_loss.*shape \[1\]"),
    "loss is a number": (lambda loss: (0.5, {}), "outer_loss.*got float"),
    "text": (lambda loss: (loss, {"note": "good"}), "metric 'note' of type str"),
    "nothing": (lambda loss: (loss, {"note": None}), "metric 'note' of type NoneType"),
    "nested": (lambda loss: (loss, {"more": {"a": 1}}), "metric 'more' of type dict"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_an_outer_loss_may_not_return(kind):
    make, message = BAD[kind]
    problem = mf.Problem(loops.inner, lambda f, s, d: make(upper(f, s, d)), start)
    meta = mf.bilevel(problem, solver=loops.solver(), estimator=mf.Unrolled())
    with pytest.raises(mf.errors.ProblemError, match=message):
        meta(CASE.outer, CASE.episode())


def test_metrics_in_windows():
    windows = mf.algorithms.Windows(MEASURED, solver=loops.solver())
    window = windows.init(CASE.outer, CASE.episode().support)
    _, (_, aux) = windows.loss(CASE.outer, window, CASE.episode())
    meta = mf.bilevel(MEASURED, solver=loops.solver(), estimator=mf.Unrolled())
    torch.testing.assert_close(
        aux.metrics, torch.no_grad()(meta)(CASE.outer, CASE.episode())[1].metrics
    )


# --- classes and functions ----------------------------------------------------------------------


def test_estimators_and_solvers_are_classes():
    estimators = {
        mf.FirstOrder: mf.FirstOrder(),
        mf.Unrolled: mf.Unrolled(),
        mf.Implicit: mf.Implicit(),
        mf.FixedPoint: mf.FixedPoint(lambda f, s, d: f),
        mf.OneStep: mf.OneStep(lambda f, s, d: f),
        mf.Penalty: mf.Penalty(1.0),
        mf.EvoGrad: mf.EvoGrad(0.1),
    }
    for kind, one in estimators.items():
        assert isinstance(one, kind) and isinstance(one, mf.Estimator)
        assert issubclass(kind, mf.Estimator) and dataclasses.is_dataclass(kind)
        assert isinstance(one.explicit, bool)
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.anything = 1
    assert not isinstance(mf.FirstOrder(), mf.Unrolled)
    explicit = [k.__name__ for k, one in estimators.items() if one.explicit]
    assert explicit == ["Implicit", "FixedPoint", "OneStep", "Penalty"]
    assert mf.Unrolled(recompute=True).explicit and not mf.Unrolled(last=0, recompute=True).explicit
    for kind in (mf.SGD, mf.Adam, mf.AdamW, mf.RMSprop, mf.Adagrad, mf.Muon):
        assert isinstance(kind(0.1, 2), kind)
    for name in dir(mf.algorithms):
        if not name.startswith("_") and isinstance(getattr(mf.algorithms, name), type):
            assert name not in dir(mf), name
    with pytest.raises(mf.errors.ProblemError, match="must define __call__"):
        mf.Estimator()(loops.inner, mf.SGD(0.1, 1), {}, {}, None)


class Halved(mf.Estimator):
    """A user's class: the exact fast weights, half of the exact derivative."""

    def __call__(self, inner_loss, solver, start, outer, support):
        found = mf.Unrolled()(inner_loss, solver, start, outer, support)
        half = {k: 0.5 * v + 0.5 * v.detach() for k, v in found.params.items()}
        return mf.Solution(half, found.losses)


def halved(inner_loss, solver, start, outer, support):
    return Halved()(inner_loss, solver, start, outer, support)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("estimator", [Halved(), halved], ids=["class", "function"])
def test_an_estimator_of_ones_own(estimator, way):
    meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator)

    def half(outer, episode):
        path = by_hand(start(outer, None), outer, slices(episode.support))
        fast = {k: 0.5 * v + 0.5 * v.detach() for k, v in path[-1].items()}
        return upper(fast, outer, slices(episode.query)[-1])

    want = [
        hypergradient(CASE.outer, lambda o, i=i: half(o, CASE.episode(i)))
        for i in range(CASE.tasks)
    ]
    assert_close(WAYS[way](meta, CASE), expected(want, way), 1e-11)


def test_an_explicit_estimator_of_ones_own_is_protected():
    class Explicit(mf.Estimator):
        explicit = True

        def __call__(self, inner_loss, solver, start, outer, support):
            return mf.FirstOrder()(inner_loss, solver, start, outer, support)

    hidden = torch.ones((), dtype=torch.float64, requires_grad=True)
    problem = mf.Problem(lambda f, s, d: hidden * loops.inner(f, s, d), upper, start)
    for estimator, raises in ((Explicit(), True), (mf.FirstOrder(), False)):
        meta = mf.bilevel(problem, solver=loops.solver(), estimator=estimator)
        if raises:
            with pytest.raises(mf.errors.ClosureError, match="inner_loss closes over"):
                meta(CASE.outer, CASE.episode())
            with pytest.raises(mf.errors.ProblemError, match=r"outer=\{\}"):
                meta({}, CASE.episode())
        else:
            torch.no_grad()(meta)(CASE.outer, CASE.episode())


def test_an_estimator_never_sees_the_query():
    seen = []

    def spy(inner_loss, solver, start, outer, support):
        seen.append(support)
        return mf.FirstOrder()(inner_loss, solver, start, outer, support)

    episode = CASE.episode()
    torch.no_grad()(mf.bilevel(PROBLEM, solver=loops.solver(), estimator=spy))(CASE.outer, episode)
    assert seen == [episode.support]


# --- the state of a solver: any pytree ----------------------------------------------------------


class Pair(NamedTuple):
    velocity: Any
    note: Any


STATES = {
    "dict": (lambda v, t: {"v": v, "n": t}, lambda s: s["v"]),
    "tuple with None": (lambda v, t: (None, v), lambda s: s[1]),
    "text": (lambda v, t: [v, "momentum"], lambda s: s[0]),
    "integers": (lambda v, t: (v, t, [t, (t,)]), lambda s: s[0]),
    "named tuple": (lambda v, t: Pair(v, {"flag": True, "at": 0.5}), lambda s: s.velocity),
    "integer tensor": (lambda v, t: (v, torch.tensor(t)), lambda s: s[0]),
    "empty": (lambda v, t: (v, {}, [], ()), lambda s: s[0]),
}


@dataclasses.dataclass(frozen=True)
class Stated:
    """Momentum, as `loops.solver()`; the velocity lies somewhere in the state."""

    pack: Any
    unpack: Any
    steps: int = STEPS

    def init(self, params):
        return self.pack({k: torch.zeros_like(v) for k, v in params.items()}, 0)

    def update(self, params, grads, state, step, outer):
        again = self.pack(self.unpack(state), step)
        assert torch.utils._pytree.tree_structure(again) == torch.utils._pytree.tree_structure(
            state
        )
        velocity = {k: loops.MOMENTUM * v + grads[k] for k, v in self.unpack(state).items()}
        fast = {k: v - loops.rate(outer) * velocity[k] for k, v in params.items()}
        return fast, self.pack(velocity, step + 1)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", UNROLLED)
def test_a_state_of_any_kind(name, kind):
    estimator, last = UNROLLED[name]
    meta = mf.bilevel(PROBLEM, solver=Stated(*STATES[kind]), estimator=estimator)
    for way, differentiate in WAYS.items():
        assert_close(differentiate(meta, CASE), expected(wanted(last), way), tolerance(name))


@dataclasses.dataclass(frozen=True)
class Stateless:
    """Plain descent with no state at all, or one that is no pytree of tensors."""

    state: Any
    steps: int = STEPS

    def init(self, params):
        return self.state

    def update(self, params, grads, state, step, outer):
        assert state == self.state
        return {k: v - loops.rate(outer) * grads[k] for k, v in params.items()}, state


@pytest.mark.parametrize(
    "state", [None, 3, "text", (), {}, [None, ("a", 1.5)], object()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("name", UNROLLED)
def test_no_state(name, state):
    plain = mf.SGD(loops.rate, STEPS)
    estimator, _ = UNROLLED[name]
    got, want = (
        mf.bilevel(PROBLEM, solver=s, estimator=estimator) for s in (Stateless(state), plain)
    )
    for way in ("hypergrad", "func.grad", "vmap(grad)", "grad(vmap)", "backward(chunks)"):
        assert_close(WAYS[way](got, CASE), WAYS[way](want, CASE), tolerance(name))


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("recompute", [False, True, 2])
def test_windows_and_particles_carry_any_state(kind, recompute):
    case = loops.case(tasks=1, steps=6)
    episode = case.episode()
    both = [
        mf.algorithms.Windows(PROBLEM, solver=solver, recompute=recompute)
        for solver in (Stated(*STATES[kind], steps=2), loops.solver(2))
    ]
    found = []
    for windows in both:
        window, grads = windows.init(case.outer, episode.support), []
        for _ in range(3):
            one, (after, _) = torch.func.grad(windows.loss, has_aux=True)(
                case.outer, window, episode
            )
            many = {k: torch.stack([v, v]) for k, v in case.outer.items()}
            _, (stacked, _) = torch.func.vmap(windows.loss, in_dims=(0, None, None))(
                many, window, episode
            )
            assert_close({k: v[1] for k, v in stacked.fast.items()}, after.fast, 1e-13)
            grads.append(one)
            window = after
        pes = mf.algorithms.PES(windows, sigma=0.1, pairs=2)
        state, generator = pes.init(case.outer, episode.support), torch.Generator().manual_seed(0)
        for _ in range(3):
            particle, state, _ = pes.step(case.outer, state, episode, generator=generator)
            grads.append(particle)
        found.append(grads)
    assert_close(found[0], found[1], 1e-12)


# --- a rule of the solver's own -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Perceptron:
    """A Hebbian rule with a learned strength: no gradient is taken."""

    steps: int = STEPS

    def init(self, params):
        return None

    def direction(self, inner_loss, params, outer, data):
        x, y, index = data
        hidden = torch.tanh(x @ params["w1"])
        error = hidden @ params["w2"] - y
        weight = torch.sigmoid(outer["weight"][index])
        rule = {
            "w1": x.T @ (weight * error).unsqueeze(1).expand(-1, 2) * params["w2"],
            "w2": hidden.T @ (weight * error),
        }
        return inner_loss(params, outer, data), rule

    def update(self, params, grads, state, step, outer):
        return {k: v - loops.rate(outer) * grads[k] for k, v in params.items()}, state


def perceptron_by_hand(outer, episode, last=None):
    first, rule = start(outer, None), Perceptron()
    batches = slices(episode.support)
    head = 0 if last is None else max(len(batches) - last, 0)
    fast, slow, losses = first, outer, []
    for t, data in enumerate(batches):
        if t == 0 and head:
            fast, slow = loops.constants(first), loops.constants(outer)
        if t == head and head:
            fast, slow = loops.tied(fast, first), outer
        loss, move = rule.direction(loops.inner, fast, slow, data)
        losses.append(loss.detach())
        fast = {k: v - loops.rate(slow) * move[k] for k, v in fast.items()}
    fast = loops.tied(fast, first) if head == len(batches) else fast
    return upper(fast, outer, slices(episode.query)[-1]), torch.stack(losses)


OWN_RULES = [n for n in UNROLLED if not n.endswith("forward") and not n.startswith("finite")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OWN_RULES)
def test_a_rule_of_its_own(name, way):
    estimator, last = UNROLLED[name]
    meta = mf.bilevel(PROBLEM, solver=Perceptron(), estimator=estimator)
    want = [
        hypergradient(CASE.outer, lambda o, i=i: perceptron_by_hand(o, CASE.episode(i), last)[0])
        for i in range(CASE.tasks)
    ]
    assert_close(WAYS[way](meta, CASE), expected(want, way), tolerance(name))
    _, aux = torch.no_grad()(meta)(CASE.outer, CASE.episode())
    assert_close(aux.inner_losses, perceptron_by_hand(CASE.outer, CASE.episode())[1], 1e-13)


def test_a_rule_of_its_own_in_adapt_windows_and_particles():
    episode = CASE.episode()
    got = mf.adapt(PROBLEM, CASE.outer, episode.support, solver=Perceptron())
    meta = mf.bilevel(PROBLEM, solver=Perceptron(), estimator=mf.Unrolled())
    want = mf.hypergrad(meta)(CASE.outer, episode)
    assert_close(got.params, want[1][1].params, 1e-13)
    assert not any(v.requires_grad for v in got.params.values())
    for recompute in (False, True):
        windows = mf.algorithms.Windows(PROBLEM, solver=Perceptron(), recompute=recompute)
        window = windows.init(CASE.outer, episode.support)
        grads = torch.func.grad(windows.loss, has_aux=True)(CASE.outer, window, episode)[0]
        assert_close(grads, want[0], 1e-11)
    pes = mf.algorithms.PES(windows, sigma=0.1, pairs=2)
    generator = torch.Generator().manual_seed(0)
    state = pes.init(CASE.outer, episode.support)
    losses = pes.step(CASE.outer, state, episode, generator=generator)[2].losses
    assert losses.shape == (2, 2) and losses.isfinite().all()


REFUSED = {
    "hvp_forward": mf.Unrolled(hvp=mf.hvp_forward),
    "_Finite": mf.Unrolled(hvp=mf.hvp_finite()),
    "Implicit": mf.Implicit(data=lambda stream: stream.at(0)),
    "Penalty": mf.Penalty(1.0, data=lambda stream: stream.at(0)),
    "Penalty ": mf.Penalty(1.0, solver=Perceptron(), data=lambda stream: stream.at(0)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_estimators_that_need_the_gradient_refuse_a_rule_by_name(name):
    solver = loops.solver() if name == "Penalty " else Perceptron()
    meta = mf.bilevel(PROBLEM, solver=solver, estimator=REFUSED[name])
    with pytest.raises(
        mf.errors.ProblemError,
        match=rf"{name.strip()}.*needs the gradient.*Perceptron\.direction replaces it",
    ):
        meta(CASE.outer, CASE.episode())


def test_a_fixed_point_does_not_need_the_gradient():
    step = lambda f, s, d: {k: 0.5 * v for k, v in f.items()}  # noqa: E731
    estimator = mf.FixedPoint(step, mf.Neumann(3, 1.0), data=lambda stream: stream.at(0))
    meta = mf.bilevel(PROBLEM, solver=Perceptron(), estimator=estimator)
    with pytest.warns(mf.errors.NotStationaryWarning):
        torch.no_grad()(meta)(CASE.outer, CASE.episode())


@dataclasses.dataclass(frozen=True)
class Odd(Perceptron):
    """A rule that returns whatever it is told to."""

    change: Any = None

    def direction(self, inner_loss, params, outer, data):
        return self.change(*super().direction(inner_loss, params, outer, data))


ODD = {
    "one value": (lambda loss, d: d, "direction must return"),
    "three": (lambda loss, d: (loss, d, None), "direction must return"),
    "the other way round": (lambda loss, d: (d, loss), "direction must return"),
    "a missing name": (lambda loss, d: (loss, {"w1": d["w1"]}), "'w2' is on one side"),
    "another name": (lambda loss, d: (loss, {**d, "w3": d["w1"]}), "'w3' is on one side"),
    "a loss of shape": (lambda loss, d: (loss.reshape(1), d), r"direction.*shape \[1\]"),
    "a number": (lambda loss, d: (0.5, d), "direction.*float"),
    "another shape": (lambda loss, d: (loss, {**d, "w1": d["w1"].T}), r"'w1'.*\[3, 2\].*\[2, 3\]"),
    "no tensor": (lambda loss, d: (loss, {**d, "w1": 0.0}), "'w1'.*float"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_rule_that_returns_something_else_is_refused(kind):
    change, message = ODD[kind]
    for name in ("FirstOrder", "graph", "recompute"):
        meta = mf.bilevel(PROBLEM, solver=Odd(change=change), estimator=UNROLLED[name][0])
        with pytest.raises(mf.errors.ProblemError, match=message):
            meta(CASE.outer, CASE.episode())


@pytest.mark.parametrize("name", OWN_RULES)
def test_a_rule_that_closes_over_a_learned_tensor(name):
    """Lost in a rebuild, so refused there; on the tape it has its gradient."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    solver = Odd(change=lambda loss, d: (loss, {k: scale * v for k, v in d.items()}))
    estimator, last = UNROLLED[name]
    meta = mf.bilevel(PROBLEM, solver=solver, estimator=estimator)
    if estimator.explicit:
        with pytest.raises(mf.errors.ClosureError, match="direction"):
            meta(CASE.outer, CASE.episode())
        return
    if last == 0:
        with pytest.raises(mf.errors.ProblemError, match="nothing in outer requires grad"):
            meta(CASE.outer, CASE.episode())
        return
    loss, _ = meta(CASE.outer, CASE.episode())
    (got,) = torch.autograd.grad(loss, scale)
    step = 1e-5

    def at(moved):
        frozen = torch.tensor(moved, dtype=torch.float64)
        solver = Odd(change=lambda loss, d: (loss, {k: frozen * v for k, v in d.items()}))
        return torch.no_grad()(mf.bilevel(PROBLEM, solver=solver, estimator=estimator))(
            CASE.outer, CASE.episode()
        )[0].detach()

    if last is None or last >= STEPS:
        # Central differences: error of order step^2 and rounding over step.
        assert_close(got, (at(1 + step) - at(1 - step)) / (2 * step), 1e-7)


# --- the first call's trial ---------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """A custom Function of the old form, without `setup_context`: torch.func refuses it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def penalised(fast, slow, data):
    """A gradient penalty as it is written everywhere: the loss makes a leaf of its own."""
    x = data[0].detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(loops.predict(fast, x).sum(), x, create_graph=True)
    return loops.inner(fast, slow, data) + 0.1 * (slope**2).sum(-1).mean()


def cubed(fast, slow, data):
    return loops.inner(fast, slow, data) + 0.01 * Cube.apply(fast["w1"]).sum()


NORMED = nn.BatchNorm1d(3, affine=False).double()


def normed(fast, slow, data):
    return loops.inner(fast, slow, (NORMED(data[0]), *data[1:]))


@pytest.mark.parametrize("loss", [penalised, cubed, normed])
@pytest.mark.parametrize("name", ["FirstOrder", "graph", "last=2", "recompute", "recompute=3"])
def test_losses_that_only_the_tape_can_run(name, loss):
    """The trial does not ask for more than the estimator does."""
    estimator, last = UNROLLED[name]
    problem = dataclasses.replace(PROBLEM, inner_loss=loss)
    for way in ("backward", "hypergrad"):
        meta = mf.bilevel(problem, solver=loops.solver(), estimator=estimator)
        want = wanted(last, start, loss)[0]
        assert_close(ONE[way](meta, CASE), want, 1e-11)


def test_the_trial_leaves_no_gradients_and_no_random_state():
    leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
    before = torch.get_rng_state()

    def noisy(fast, slow, data):
        return loops.inner(fast, slow, data) + 0 * torch.rand(()) * fast["w1"].sum()

    problem = dataclasses.replace(PROBLEM, inner_loss=noisy)
    mf.bilevel(problem, solver=loops.solver(0), estimator=mf.Unrolled())(leaves, CASE.episode())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(v.grad is None for v in leaves.values())


# --- compare and compiled -----------------------------------------------------------------------


class Mine:
    """An estimator with a linear solver, and no dataclass."""

    explicit = True

    def __init__(self):
        self.solve = mf.CG(2)

    def __call__(self, *args):
        return mf.Implicit(self.solve, data=lambda stream: stream.at(0))(*args)


def test_compare_takes_streams_and_estimators_of_any_kind():
    episode = loops.case(steps=STEPS + 4).episode()
    rows = mf.compare(
        PROBLEM,
        CASE.outer,
        episode,
        solver=loops.solver(),
        estimators={
            "graph": mf.Unrolled(),
            "recompute": mf.Unrolled(recompute=True),
            "first order": mf.FirstOrder(),
            "each product": mf.Implicit(mf.Neumann(2, 0.1), data="each product"),
            "mine": Mine(),
        },
        reference="graph",
        repeats=1,
    ).rows
    errors = {row["name"]: row["relative_error"] for row in rows}
    assert errors["recompute"] < 1e-12 < 1e-3 < errors["first order"]
    products = {row["name"]: row["hvp_evaluations"] for row in rows}
    assert products["first order"] == 0 and products["graph"] == STEPS
    assert products["each product"] == 2


@pytest.mark.parametrize("path", [None, loops.learned_path], ids=["last", "path"])
@pytest.mark.parametrize("name", ["FirstOrder", "graph", "recompute"])
def test_compiled_takes_a_stream_of_tensors_and_a_path(name, path):
    meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=UNROLLED[name][0], path=path)
    eager = mf.hypergrad(meta)
    fast = mf.compiled(eager, backend="eager")
    for scale in (1.0, 1.1):
        outer = {k: scale * v for k, v in CASE.outer.items()}
        assert_close(fast(outer, CASE.episode())[0], eager(outer, CASE.episode())[0], 1e-12)
    stream = mf.Episode(loops.batches_of(slices(CASE.episode().support)), CASE.episode().query)
    with pytest.raises(mf.errors.ProblemError, match="tensors and constants, got Batches"):
        fast(CASE.outer, stream)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inductor_keeps_the_learning_rate():
    """Inductor of torch 2.13 drops alpha of an addition where it makes addmm of it and a product.

    The gradient of a matrix without transposition is such a product.
    """
    problem = mf.Problem(loops.inner, upper, start)
    for steps in (1, STEPS):
        solver = mf.SGD(0.1, steps, momentum=0.5)
        eager = mf.hypergrad(mf.bilevel(problem, solver=solver, estimator=mf.Unrolled()))
        got = mf.compiled(eager)(CASE.outer, CASE.episode())[0]
        assert_close(got, eager(CASE.outer, CASE.episode())[0], 1e-12)


@pytest.mark.parametrize("way", ["grad", "vmap of grad", "grad of vmap", "jvp", "hypergrad"])
def test_constants_of_an_estimator_are_refused_in_transforms_too(way):
    """Else the part of the hypergradient that goes through the fast weights would be missing."""

    def loss(fast, slow, x):
        return ((fast["w"] - x) ** 2).sum() + (slow["w"] ** 2).sum()

    meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.1, 2), estimator=mf.solve_inner)
    outer, x = {"w": torch.ones(2)}, torch.zeros(3, 2)

    def value(point, x):
        return meta(point, mf.Episode(x, x))[0]

    ways = {
        "grad": lambda: torch.func.grad(value)(outer, x[0]),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(value), (None, 0))(outer, x),
        "grad of vmap": lambda: torch.func.grad(
            lambda point: torch.vmap(value, (None, 0))(point, x).sum()
        )(outer),
        "jvp": lambda: torch.func.jvp(lambda point: value(point, x[0]), (outer,), (outer,)),
        "hypergrad": lambda: mf.hypergrad(meta)(outer, mf.Episode(x[0], x[0])),
    }
    with pytest.raises(mf.errors.ProblemError, match="returned constants"):
        ways[way]()
    tracked = {"w": outer["w"].clone().requires_grad_()}
    with torch.no_grad():
        assert torch.vmap(value, (None, 0))(tracked, x).isfinite().all()
