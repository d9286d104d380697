"""Truncated windows: one is `Unrolled`, several are its last steps, all are warm-started."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import problems
import pytest
import torch
from problems import F64, SOLVERS, assert_close, flat, grads_of
from torch.utils import _pytree as pytree

import metafocus as mf


@dataclass(frozen=True)
class Schedule:
    """Gradient descent with one learned rate per inner step, looked up by number."""

    steps: int

    def init(self, params):
        return {}

    def update(self, params, grads, state, step, outer):
        rate = outer["rates"][step]
        return {k: p - rate * grads[k] for k, p in params.items()}, state


def scheduled(steps: int):
    case = problems.Ridge().case()
    outer = case.outer | {"rates": torch.linspace(0.02, 0.05, 12, dtype=F64)}
    return case, outer, mf.algorithms.Windows(case.problem, solver=Schedule(steps))


@pytest.mark.parametrize("recompute", [False, True, 2])
def test_t22_the_gradient_by_early_windows_is_exactly_zero(recompute):
    # T22 of the claims: truncation forgets earlier windows altogether, and only these.
    case, outer, unroll = scheduled(4)
    unroll = mf.algorithms.Windows(case.problem, solver=Schedule(4), recompute=recompute)
    window = unroll.init(outer)
    for first in (0, 4, 8):
        grads, (window, _) = torch.func.grad(unroll.loss, has_aux=True)(
            outer, window, case.episode()
        )
        inside = torch.zeros(12, dtype=torch.bool)
        inside[first : first + 4] = True
        assert (grads["rates"][~inside] == 0).all()
        assert (grads["rates"][inside] != 0).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_one_window_of_all_steps_is_unrolled(name):
    # The start depends on the outer parameters here, so this is MAML's derivative as well.
    case = problems.maml()
    solver = SOLVERS[name].solver(5)
    episode = case.episode()
    meta = mf.bilevel(case.problem, solver=solver, estimator=mf.Unrolled())
    want, (value, aux) = mf.hypergrad(meta)(case.outer, episode)
    unroll = mf.algorithms.Windows(case.problem, solver=solver)
    leaves = case.leaves()
    loss, (window, got) = unroll.loss(leaves, unroll.init(leaves), episode)
    loss.backward()
    # The same operations in the same order.
    assert_close(loss, value, 1e-14)
    assert_close(grads_of(leaves), want, 1e-13)
    assert_close(got.params, aux.params, 1e-14)
    assert_close(got.inner_losses, aux.inner_losses, 1e-14)
    assert_close(window.fast, aux.params, 1e-14)


@dataclass(frozen=True)
class Anchored:
    """Gradient descent that is pulled to where it began: its state is the start itself."""

    steps: int

    def init(self, params):
        return {"anchor": params, "count": None}

    def update(self, params, grads, state, step, outer):
        moved = {k: p - 0.1 * grads[k] for k, p in params.items()}
        return {k: p - 0.3 * (p - state["anchor"][k]) for k, p in moved.items()}, state


@pytest.mark.parametrize("recompute", [False, True, 2])
def test_a_state_that_depends_on_the_start_is_differentiated_in_the_first_window(recompute):
    case = problems.maml()
    episode, solver = case.episode(), Anchored(3)
    meta = mf.bilevel(case.problem, solver=solver, estimator=mf.Unrolled())
    want, (value, _) = mf.hypergrad(meta)(case.outer, episode)
    windows = mf.algorithms.Windows(case.problem, solver=solver, recompute=recompute)
    start = windows.init(case.outer)
    grads, (window, _) = torch.func.grad(windows.loss, has_aux=True)(case.outer, start, episode)
    loss, _ = windows.loss(case.outer, start, episode)
    # The same operations; a rebuilt step sums in another order.
    assert_close(loss, value, 1e-14)
    assert_close(grads, want, 1e-12)

    # In the second window the anchor is a constant, as the fast weights are.
    def second(outer):
        held = mf.Problem(
            case.problem.inner_loss, case.problem.outer_loss, lambda slow, support: window.fast
        )
        state = {"anchor": start.fast, "count": None}

        @dataclass(frozen=True)
        class Going(Anchored):
            def init(self, params):
                return state

        return mf.bilevel(held, solver=Going(3), estimator=mf.Unrolled())(outer, episode)[0]

    later, _ = torch.func.grad(windows.loss, has_aux=True)(case.outer, window, episode)
    assert_close(later, torch.func.grad(second)(case.outer), 1e-12)


@pytest.mark.parametrize("name", ["plain", "nesterov", "adam", "learned_rate"])
def test_the_last_of_several_windows_is_unrolled_last(name):
    # Ridge: the start does not depend on the outer parameters, so the straight-through tie of
    # Unrolled(last=k) adds nothing.
    case = problems.Ridge().case()
    outer = case.outer | {"log_lr": torch.tensor(-3.0, dtype=F64)}
    recipe = SOLVERS[name]
    unroll = mf.algorithms.Windows(case.problem, solver=recipe.solver(4))
    window = unroll.init(outer)
    for j in (1, 2, 3):
        got, (window, aux) = torch.func.grad(unroll.loss, has_aux=True)(
            outer, window, case.episode()
        )
        whole = mf.bilevel(case.problem, solver=recipe.solver(4 * j), estimator=mf.Unrolled(last=4))
        want, (_, all_aux) = mf.hypergrad(whole)(outer, case.episode())
        # Two back ends, the same formulas: rounding.
        assert_close(got, want, 1e-12)
        assert_close(window.fast, all_aux.params, 1e-13)
        assert_close(aux.inner_losses, all_aux.inner_losses[-4:], 1e-12)
        assert window.step == 4 * j


@pytest.mark.parametrize("name", SOLVERS)
def test_warm_starts_go_on_as_one_inner_loop(name):
    case = problems.maml()
    recipe, episode = SOLVERS[name], case.episode()
    unroll = mf.algorithms.Windows(case.problem, solver=recipe.solver(3))
    window = unroll.init(case.outer)
    for _ in range(4):
        _, (window, _) = unroll.loss(case.outer, window, episode)
    whole = mf.adapt(case.problem, case.outer, episode.support, solver=recipe.solver(12))
    assert_close(window.fast, whole.params, 1e-13)


def test_each_window_has_its_own_support_and_query():
    case = problems.maml()
    unroll = mf.algorithms.Windows(case.problem, solver=mf.SGD(0.05, steps=2))
    _, (window, _) = unroll.loss(case.outer, unroll.init(case.outer), case.episode(0))
    loss, (after, aux) = unroll.loss(case.outer, window, case.episode(1))
    fast = problems.naive_adapt(
        case.problem.inner_loss,
        {k: v.clone().requires_grad_() for k, v in window.fast.items()},
        case.outer,
        case.episode(1).support,
        problems.Recipe(),
        2,
    )
    assert_close(after.fast, fast, 1e-13)
    assert_close(loss, case.problem.outer_loss(fast, case.outer, case.episode(1).query), 1e-13)
    first = case.problem.inner_loss(window.fast, case.outer, case.episode(1).support)
    assert_close(aux.inner_losses[0], first, 1e-14)


def second_window(recompute=False, name="nesterov"):
    """Three tasks, each in its second window, alone and stacked."""
    case = problems.maml()
    unroll = mf.algorithms.Windows(
        case.problem, solver=SOLVERS[name].solver(3), recompute=recompute
    )
    windows = []
    for i in range(3):
        _, (window, _) = unroll.loss(case.outer, unroll.init(case.outer), case.episode(i))
        windows.append(window)
    stack = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *windows)
    return case, unroll, windows, stack


@pytest.mark.parametrize("name", ["plain", "nesterov", "adam"])
@pytest.mark.parametrize("recompute", [False, True, 2])
def test_backward_grad_vmap_and_their_compositions(recompute, name):
    case, unroll, windows, stack = second_window(recompute, name)
    plain = mf.algorithms.Windows(case.problem, solver=unroll.solver)
    each, values = [], []
    for i, window in enumerate(windows):
        leaves = case.leaves()
        loss, _ = plain.loss(leaves, window, case.episode(i))
        loss.backward()
        each.append(grads_of(leaves))
        values.append(loss.detach())
    want = {k: torch.stack([g[k] for g in each]) for k in case.outer}
    mean = {k: v.mean(0) for k, v in want.items()}

    # vmap of grad
    mapped = torch.func.vmap(torch.func.grad(unroll.loss, has_aux=True), in_dims=(None, 0, 0))
    got, (after, aux) = mapped(case.outer, stack, case.episodes)
    # Rounding between a batched and a single evaluation.
    assert_close(got, want, 1e-11)
    assert after.step == 6
    assert aux.inner_losses.shape == (3, 3)

    # grad of vmap, and backward through vmap
    def average(outer):
        losses, (_, _) = torch.func.vmap(unroll.loss, in_dims=(None, 0, 0))(
            outer, stack, case.episodes
        )
        return losses.mean()

    assert_close(torch.func.grad(average)(case.outer), mean, 1e-11)
    leaves = case.leaves()
    value = average(leaves)
    value.backward()
    assert_close(grads_of(leaves), mean, 1e-11)
    assert_close(value, torch.stack(values).mean(), 1e-12)

    # hypergrad, with the window in the closure
    meta = mf.hypergrad(lambda o, e: unroll.loss(o, windows[0], e))
    assert_close(meta(case.outer, case.episode())[0], each[0], 1e-12)


def test_the_window_is_a_constant_of_the_loss():
    case, unroll, windows, _ = second_window()
    fast = {k: v.clone().requires_grad_() for k, v in windows[0].fast.items()}
    state = pytree.tree_map(lambda x: x.clone().requires_grad_(), windows[0].solver_state)
    loss, (after, aux) = unroll.loss(
        case.leaves(), mf.algorithms.Window(fast, state, 3), case.episode()
    )
    loss.backward()
    leaves = [*fast.values(), *pytree.tree_leaves(state)]
    assert len(leaves) == 2 * len(fast)
    assert all(v.grad is None for v in leaves)
    assert not any(x.requires_grad for x in (*after.fast.values(), *aux.params.values()))


def test_the_window_does_not_alias_the_outer_parameters():
    # MAML's init is the identity, and torch optimisers write in place.
    problem = mf.Problem(problems.regression, problems.regression)
    outer = {k: problems.maml().outer[k].clone() for k in problems.FAST}
    unroll = mf.algorithms.Windows(problem, solver=mf.SGD(0.1, steps=1, momentum=0.9))
    window = unroll.init(outer)
    before = flat(window).clone()
    for v in outer.values():
        v.add_(1.0)
    assert torch.equal(flat(window), before)


def test_a_run_resumes_from_a_checkpoint():
    case, unroll, windows, _ = second_window(name="adam")
    file = io.BytesIO()
    torch.save(vars(windows[0]), file)
    file.seek(0)
    resumed = mf.algorithms.Window(**torch.load(file, weights_only=True))
    want = unroll.loss(case.outer, windows[0], case.episode())
    got = unroll.loss(case.outer, resumed, case.episode())
    assert torch.equal(flat(got), flat(want))
    assert got[1][0].step == 6


def test_prepare_is_differentiated_in_every_window():
    def prepare(slow, episode):
        return mf.Episode(slow["scale"] * episode.support, slow["scale"] * episode.query)

    def loss(fast, slow, x):
        return ((fast["w"] - x) ** 2).sum()

    def whole(fast, slow, x):
        return ((fast["w"] - slow["scale"] * x) ** 2).sum()

    start = {"w": torch.zeros(2, dtype=F64)}
    outer = {"scale": torch.tensor(1.5, dtype=F64)}
    episode = mf.Episode(*torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=F64).unbind())
    found = []
    for problem in (
        mf.Problem(loss, loss, lambda slow, support: start, prepare=prepare),
        mf.Problem(whole, whole, lambda slow, support: start),
    ):
        unroll = mf.algorithms.Windows(problem, solver=mf.SGD(0.1, steps=2))
        window = unroll.init(outer)
        for _ in range(2):
            grads, (window, _) = torch.func.grad(unroll.loss, has_aux=True)(outer, window, episode)
        found.append(grads)
    assert_close(found[0], found[1], 1e-13)


def test_errors():
    case = problems.maml()
    with pytest.raises(ValueError, match=r"solver\.steps must be an integer >= 1.*got 0"):
        mf.algorithms.Windows(case.problem, solver=mf.SGD(0.1, steps=0))
    with pytest.raises(ValueError, match="recompute must be an integer >= 0, got -1"):
        mf.algorithms.Windows(case.problem, solver=mf.SGD(0.1, steps=1), recompute=-1)
    unroll = mf.algorithms.Windows(case.problem, solver=mf.SGD(0.1, steps=2))
    with pytest.raises(mf.errors.ProblemError, match="window must be a Window, got dict"):
        unroll.loss(case.outer, {"fast": {}}, case.episode())
    with pytest.raises(mf.errors.ProblemError, match="outer parameters"):
        unroll.init({"w": 3})
    (x, y), query = case.episode()
    with pytest.raises(mf.errors.NonFiniteError, match="before inner step 0"):
        unroll.loss(case.outer, unroll.init(case.outer), mf.Episode((x, y * math.nan), query))

    closed = torch.ones(1, dtype=F64, requires_grad=True)
    problem = mf.Problem(
        lambda fast, slow, x: ((fast["w"] - closed) ** 2).sum(),
        lambda fast, slow, x: (fast["w"] ** 2).sum(),
        lambda slow, support: {"w": torch.zeros(1, dtype=F64)},
    )
    blind = mf.algorithms.Windows(problem, solver=mf.SGD(0.1, steps=1), recompute=True)
    outer = {"a": torch.ones(1, dtype=F64)}
    with pytest.raises(mf.errors.ClosureError):
        blind.loss(outer, blind.init(outer), mf.Episode(None, None))
