"""Stores with uncommon states, data and parameters: the derivative of the graph, or an error."""

from __future__ import annotations

import dataclasses

import loops
import pytest
import torch
from loops import PROBLEM
from problems import assert_close

import metafocus as mf

F64 = torch.float64
STEPS = 7
G = torch.Generator().manual_seed(0)
X = torch.randn(6, 3, generator=G, dtype=F64)
Y = torch.randn(6, generator=G, dtype=F64)
OUTER = {"w": torch.randn(3, generator=G, dtype=F64), "scale": torch.tensor(0.7, dtype=F64)}
EPISODE = mf.Episode((X, Y), (X.flip(0), Y))


@pytest.fixture(params=["device", "cpu", "disk", "segments", "schedule", "tree"])
def store(request, tmp_path):
    return {
        "device": mf.stores.device(),
        "cpu": mf.stores.cpu(),
        "disk": mf.stores.disk(tmp_path),
        "segments": mf.stores.segments(),
        "schedule": mf.stores.schedule(2),
        "tree": mf.stores.tree(2),
    }[request.param]


def loss(fast, slow, data):
    return ((torch.tanh(data[0] @ fast["w"]) - data[1]) ** 2 * slow["scale"]).mean()


def of_complex_data(fast, slow, data):
    size = (data[0] @ fast["w"].to(data[0].dtype)).abs() ** 2
    return (size * slow["scale"] - data[1]).pow(2).mean()


def problem_of(inner):
    return mf.Problem(inner, inner, lambda slow, _: {"w": slow["w"]})


def grads(estimator, problem, outer, episode, solver, data=()):
    leaves = {
        k: v if isinstance(v, torch.nn.Parameter) else v.clone().requires_grad_()
        for k, v in outer.items()
    }
    value, _ = mf.bilevel(problem, solver=solver, estimator=estimator)(leaves, episode)
    wanted = [*(v for v in leaves.values() if v.requires_grad), *data]
    return torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)


def check(store, problem, outer, episode, solver, data=()):
    got = grads(mf.Unrolled(store=store), problem, outer, episode, solver, data)
    want = grads(mf.Unrolled(), problem, outer, episode, solver, data)
    assert any(g.abs().sum() > 0 for g in want)
    # The same operations; only sums over the steps have another order.
    assert_close(got, want, 1e-13)


@dataclasses.dataclass(frozen=True)
class Counting:
    """Integer tensors, a Python integer and None in the state."""

    steps: int = STEPS

    def init(self, params):
        moments = {k: torch.zeros_like(v) for k, v in params.items()}
        return {
            "n": torch.tensor(0),
            "python": 0,
            "m": moments,
            "order": torch.arange(3),
            "no": None,
        }

    def update(self, params, grads, state, step, outer):
        n, order = state["n"] + 1, state["order"]
        m = {k: 0.9 * state["m"][k] + grads[k] for k in params}
        rate = 0.1 * outer["scale"] / (n + state["python"])
        after = {"n": n, "python": state["python"] + 1, "m": m, "order": order.roll(1), "no": None}
        return {k: v - rate * m[k][order] for k, v in params.items()}, after


@dataclasses.dataclass(frozen=True)
class Late:
    """A state that is made by the first step."""

    steps: int = STEPS

    def init(self, params):
        return None

    def update(self, params, grads, state, step, outer):
        m = grads if state is None else {k: 0.9 * state[k] + grads[k] for k in params}
        return {k: v - 0.1 * m[k] for k, v in params.items()}, m


@dataclasses.dataclass(frozen=True)
class Anchored:
    """A state that is the start itself, which has a derivative."""

    steps: int = STEPS

    def init(self, params):
        return params

    def update(self, params, grads, state, step, outer):
        pulled = {k: grads[k] + 0.3 * (v - state[k]) for k, v in params.items()}
        return {k: v - 0.1 * pulled[k] for k, v in params.items()}, state


@pytest.mark.parametrize("solver", [Counting(), Late(), Anchored()], ids=lambda s: type(s).__name__)
def test_states_of_other_kinds(store, solver):
    check(store, problem_of(loss), OUTER, EPISODE, solver)


def test_complex_data_with_a_derivative(store):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.complex128)
    x.requires_grad_()
    episode = mf.Episode((x, Y), (x.detach().flip(0), Y))
    solver = mf.SGD(0.01, STEPS, momentum=0.9)
    check(store, problem_of(of_complex_data), OUTER, episode, solver, [x])


@pytest.mark.parametrize("name", OUTER)
def test_frozen_parameters(store, name):
    frozen = torch.nn.Parameter(OUTER[name].clone(), requires_grad=False)
    check(store, problem_of(loss), {**OUTER, name: frozen}, EPISODE, mf.Adam(0.1, STEPS))


def test_no_steps(store):
    check(store, problem_of(loss), OUTER, EPISODE, mf.SGD(0.1, 0))


def test_no_fast_weights(store):
    def constant(fast, slow, data):
        return slow["scale"] ** 2

    problem = mf.Problem(constant, constant, lambda slow, _: {})
    check(store, problem, OUTER, EPISODE, mf.SGD(0.1, STEPS))


CASE = loops.case(tasks=1, steps=STEPS)


@pytest.mark.parametrize("estimator", ["store", "recompute"])
@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
def test_a_stream_that_is_not_pure_at_one_step_is_refused(estimator, step):
    parts, calls = loops.slices(CASE.episode().support), []

    def fetch(t):
        x, y, index = parts[t]
        calls.append(t)
        return (x + len(calls) if t == step else x), y, index

    how = {
        "store": mf.Unrolled(store=mf.stores.schedule(3)),
        "recompute": mf.Unrolled(recompute=True),
    }[estimator]
    meta = mf.bilevel(PROBLEM, solver=loops.solver(STEPS), estimator=how)
    value, _ = meta(CASE.leaves(), mf.Episode(mf.Batches(fetch, STEPS), CASE.episode().query))
    with pytest.raises(mf.errors.ProblemError, match=rf"inner step {step} .*at.step. must be pure"):
        value.backward()
