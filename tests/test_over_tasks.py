"""Chunks of tasks: the memory of one, the gradient of all, and what cannot be taken apart."""

from __future__ import annotations

import itertools

import loops
import pytest
import torch
from loops import PROBLEM
from problems import assert_close, grads_of
from torch import nn
from torch.utils import _pytree as pytree

import metafocus as mf
from metafocus.comparison.memory import peak_bytes

CASE = loops.case(tasks=5)
HOWS = {
    "loop": {"how": "loop"},
    "chunks of 1": {"chunk_size": 1},
    "chunks of 2": {"chunk_size": 2},
    "chunks of 3": {"chunk_size": 3},
    "chunks of 99": {"chunk_size": 99},
    "auto": {},
}
WHOLE = {"chunk_size": None}
ESTIMATORS = {
    "FirstOrder": mf.FirstOrder(),
    "graph": mf.Unrolled(),
    "last=2": mf.Unrolled(last=2),
    "recompute": mf.Unrolled(recompute=True),
    "recompute=3": mf.Unrolled(recompute=3),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    # A solve that is linear in its right-hand side: sums may be taken before or after it.
    "Implicit": mf.Implicit(mf.Dense(), data=lambda stream: stream.at(0)),
    "Penalty": mf.Penalty(100.0, data=lambda stream: stream.at(0)),
}
FIRST = ("Penalty",)
"""These have no second derivative."""

pytestmark = pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")


def meta_of(estimator=None, **options):
    estimator = mf.Unrolled() if estimator is None else estimator
    return mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator, **options)


def value_and_grads(meta, outer=None, episodes=None):
    leaves = {k: v.clone().requires_grad_() for k, v in (outer or CASE.outer).items()}
    loss, aux = meta(leaves, CASE.episodes if episodes is None else episodes)
    loss.backward()
    return loss.detach(), grads_of(leaves), aux


def tolerance(name):
    # The same sums in another order; Penalty enlarges rounding by its strength.
    return 1e-9 if name == "Penalty" else 1e-12


# --- the gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_chunks_are_the_whole(name, how):
    meta = meta_of(ESTIMATORS[name])
    want, want_grads, want_aux = value_and_grads(mf.over_tasks(meta, **WHOLE))
    chunked = mf.over_tasks(meta, **HOWS[how])
    got, grads, aux = value_and_grads(chunked)
    assert_close(got, want, 1e-13)
    assert_close(grads, want_grads, tolerance(name))
    assert_close(aux.params, want_aux.params, 1e-12)
    assert_close(aux.inner_losses, want_aux.inner_losses, 1e-12)
    by_hypergrad, (loss, _) = mf.hypergrad(chunked)(CASE.outer, CASE.episodes)
    assert_close(by_hypergrad, want_grads, tolerance(name))
    assert_close(loss, want, 1e-13)
    by_func, (loss, _) = torch.func.grad_and_value(chunked, has_aux=True)(CASE.outer, CASE.episodes)
    assert_close(by_func, want_grads, tolerance(name))


def second(meta):
    """The loss, its gradient, and the gradient of a function of both: on the tape."""
    leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
    # Not leaves: the past of the outer parameters counts too.
    outer = {k: 1.5 * v for k, v in leaves.items()}
    loss, _ = meta(outer, CASE.episodes)
    grads = torch.autograd.grad(
        loss**2, list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    size = sum((g**2).sum() for g in grads) * loss
    again = torch.autograd.grad(
        size, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return [loss.detach(), *(g.detach() for g in grads), *again]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n not in FIRST])
def test_second_derivatives_of_chunks_are_those_of_the_whole(name, how):
    meta = meta_of(ESTIMATORS[name])
    got, want = (second(mf.over_tasks(meta, **o)) for o in (HOWS[how], WHOLE))
    assert_close(got, want, 1e-10)


@pytest.mark.parametrize("how", HOWS)
def test_the_hypergradient_is_differentiated_again(how):
    def sizes(**options):
        leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
        grads, _ = mf.hypergrad(mf.over_tasks(meta_of(), **options))(leaves, CASE.episodes)
        sum((g**2).sum() for g in grads.values()).backward()
        return grads_of(leaves)

    assert_close(sizes(**HOWS[how]), sizes(**WHOLE), 1e-10)


@pytest.mark.parametrize("how", HOWS)
def test_third_derivatives_of_chunks_are_those_of_the_whole(how):
    def third(**options):
        leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
        loss, _ = mf.over_tasks(meta_of(), **options)(leaves, CASE.episodes)
        for differentiable in (True, True, False):
            grads = torch.autograd.grad(
                loss, list(leaves.values()), create_graph=differentiable, materialize_grads=True
            )
            loss = sum((g**2).sum() for g in grads)
        return grads

    assert_close(third(**HOWS[how]), third(**WHOLE), 1e-9)


def test_the_backward_pass_may_be_run_twice_and_with_any_cotangent():
    leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
    loss, _ = mf.over_tasks(meta_of(), chunk_size=2)(leaves, CASE.episodes)
    first = torch.autograd.grad(loss, leaves["w1"], retain_graph=True)[0]
    other = torch.autograd.grad(loss, leaves["w1"], torch.tensor(-2.0), retain_graph=True)[0]
    assert_close(other, -2 * first, 1e-15)
    many = torch.autograd.grad(loss, leaves["w1"], torch.tensor([1.0, 3.0]), is_grads_batched=True)[
        0
    ]
    assert_close(many, torch.stack([first, 3 * first]), 1e-15)


# --- memory -------------------------------------------------------------------------------------

NET = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))


def regression(fast, slow, data):
    x, y = data
    return ((torch.func.functional_call(NET, fast, (x,)) - y) ** 2).mean()


def wrapped_in_a_lambda(meta):
    return lambda outer, episodes: meta(outer, episodes)


def with_a_decay(meta):
    def loss(outer, episodes):
        value, aux = meta(outer, episodes)
        return value + 1e-3 * sum((v**2).sum() for v in outer.values()), aux

    return loss


WRAPPERS = {"plain": lambda meta: meta, "lambda": wrapped_in_a_lambda, "decay": with_a_decay}


def by_hypergrad(meta, outer, episodes):
    mf.hypergrad(meta)({k: v.detach() for k, v in outer.items()}, episodes)


def by_hypergrad_of_leaves(meta, outer, episodes):
    """What it returns can be differentiated again; until then no graph is kept."""
    mf.hypergrad(meta)(outer, episodes)


def by_backward(meta, outer, episodes):
    meta({k: v.detach().requires_grad_() for k, v in outer.items()}, episodes)[0].backward()


@pytest.mark.parametrize("how", ["loop", "chunks of 2", "same numbers"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("way", [by_hypergrad, by_hypergrad_of_leaves, by_backward])
def test_the_memory_is_that_of_one_chunk_whatever_wraps_it(way, wrapper, how):
    options = {
        "loop": {"how": "loop"},
        "chunks of 2": {"chunk_size": 2},
        "same numbers": {"chunk_size": 2, "randomness": "same"},
    }[how]
    meta = WRAPPERS[wrapper](mf.over_tasks(meta_of_net(), aux="losses", **options))
    outer = mf.trainable(NET)
    data = torch.randn(16, 16, 8), torch.randn(16, 16, 1)

    def peak(tasks):
        part = tuple(x[:tasks] for x in data)
        way(meta, outer, mf.Episode(part, part))
        return peak_bytes(lambda: way(meta, outer, mf.Episode(part, part)))[1]

    few, many = peak(4), peak(16)
    # Four times the tasks. A gradient, and a few numbers a task; one kept graph would double it.
    assert many < 1.1 * few


def test_without_chunks_the_memory_grows():
    """What the test above would find if the chunks kept their graphs."""
    outer, data = mf.trainable(NET), (torch.randn(16, 16, 8), torch.randn(16, 16, 1))

    def peak(tasks, way=by_backward):
        part = mf.Episode(*(tuple(x[:tasks] for x in data),) * 2)
        meta = mf.over_tasks(meta_of_net(), chunk_size=None)
        way(meta, outer, part)
        return peak_bytes(lambda: way(meta, outer, part))[1]

    assert peak(16) > 5 * peak(2)


def meta_of_net():
    return mf.bilevel(
        mf.Problem(regression, regression), solver=mf.SGD(0.01, 5), estimator=mf.Unrolled()
    )


def test_all_adapted_weights_are_kept_once():
    outer, data = mf.trainable(NET), (torch.randn(32, 4, 8), torch.randn(32, 4, 1))
    size = 4 * sum(v.numel() for v in outer.values())

    def peak(aux):
        meta = mf.over_tasks(meta_of_net(), chunk_size=2, aux=aux)
        by_backward(meta, outer, mf.Episode(data, data))
        return peak_bytes(lambda: by_backward(meta, outer, mf.Episode(data, data)))[1]

    extra = peak("all") - peak("losses")
    # The fast weights of 32 tasks, and not twice.
    assert 32 * size <= extra < 1.2 * 32 * size


# --- what comes beside the loss -----------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
def test_losses_alone_keep_no_adapted_weights(how):
    for way in (
        value_and_grads,
        lambda m: (None, None, torch.no_grad()(m)(CASE.outer, CASE.episodes)[1]),
    ):
        aux = way(mf.over_tasks(meta_of(), aux="losses", **HOWS[how]))[2]
        whole = way(mf.over_tasks(meta_of(), **WHOLE))[2]
        assert aux.params == {}
        assert_close(aux.inner_losses, whole.inner_losses, 1e-12)


def measured(fast, slow, data):
    error = loops.predict(fast, data[0]) - data[1]
    return loops.upper(fast, slow, data), {
        "largest": error.abs().max(),
        "each": error,
        "count": len(data[1]),
        "rate": 0.25,
        "finite": True,
        "right": (error.abs() < 1).sum(),
    }


@pytest.mark.parametrize("how", HOWS)
def test_metrics_are_stacked_and_constants(how):
    problem = mf.Problem(loops.inner, measured, loops.start)
    meta = mf.bilevel(problem, solver=loops.solver(), estimator=mf.Unrolled())
    _, _, aux = value_and_grads(mf.over_tasks(meta, **HOWS[how]))
    each = [torch.no_grad()(meta)(CASE.outer, CASE.episode(i))[1] for i in range(5)]
    assert list(aux.metrics) == list(each[0].metrics)
    for name, got in aux.metrics.items():
        want = torch.stack([a.metrics[name] for a in each])
        assert got.shape == want.shape and got.dtype == want.dtype and not got.requires_grad
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    in_transform = torch.func.grad(mf.over_tasks(meta, **HOWS[how]), has_aux=True)
    again = in_transform(CASE.outer, CASE.episodes)[1]
    torch.testing.assert_close(again.metrics, aux.metrics, rtol=1e-12, atol=0)


def metrics_by_task(*by_task):
    """A meta loss whose metrics are given, task by task, in a loop."""
    queries = [pytree.tree_leaves(CASE.episode(i).query)[0] for i in range(len(by_task))]

    def upper(fast, slow, data):
        first = pytree.tree_leaves(data)[0]
        task = next(i for i, q in enumerate(queries) if torch.equal(q[-1], first))
        return loops.upper(fast, slow, data), by_task[task]

    problem = mf.Problem(loops.inner, upper, loops.start)
    meta = mf.bilevel(problem, solver=loops.solver(), estimator=mf.FirstOrder())
    return mf.over_tasks(meta, how="loop")


def test_other_metrics_of_another_task_are_refused():
    episodes = mf.stack_episodes([CASE.episode(0), CASE.episode(1)])
    for other in ({"b": 1.0}, {}, {"a": 1.0, "b": 2.0}):
        with pytest.raises(mf.errors.ProblemError, match=r"task 1 and task 0.*different metrics"):
            torch.no_grad()(metrics_by_task({"a": 0.5}, other))(CASE.outer, episodes)
    with pytest.raises(mf.errors.ProblemError, match=r"task 1.*shape \[3\].*task 0.*\[2\]"):
        torch.no_grad()(metrics_by_task({"a": torch.zeros(2)}, {"a": torch.zeros(3)}))(
            CASE.outer, episodes
        )


def test_the_order_of_metrics_does_not_matter():
    episodes = mf.stack_episodes([CASE.episode(0), CASE.episode(1)])
    for way in (
        lambda m: torch.no_grad()(m)(CASE.outer, episodes),
        lambda m: value_and_grads(m, None, episodes),
    ):
        meta = metrics_by_task({"a": 1.0, "b": 2.0}, {"b": 20.0, "a": 10.0})
        metrics = way(meta)[-1].metrics
        assert metrics["a"].tolist() == [1.0, 10.0] and metrics["b"].tolist() == [2.0, 20.0]


def test_an_integer_for_one_task_does_not_cut_the_numbers_of_the_others():
    episodes = mf.stack_episodes([CASE.episode(0), CASE.episode(1)])
    meta = metrics_by_task({"accuracy": 1}, {"accuracy": 0.5})
    assert torch.no_grad()(meta)(CASE.outer, episodes)[1].metrics["accuracy"].tolist() == [1.0, 0.5]


def test_any_auxiliary_output_of_a_meta_loss_is_stacked():
    def meta(outer, x):
        return (outer["w"] * x).sum(), {"x": x, "name": "task", "none": None}

    outer, x = {"w": torch.ones(3, requires_grad=True)}, torch.randn(4, 3)
    for options in ({"how": "loop"},):
        loss, aux = mf.over_tasks(meta, **options)(outer, x)
        assert torch.equal(aux["x"], x) and aux["name"] == "task" and aux["none"] is None
        loss.backward()
    assert_close(outer["w"].grad, x.mean(0), 1e-6)  # float32


# --- where something besides outer needs a gradient ---------------------------------------------


@pytest.mark.parametrize("how", HOWS)
def test_parameters_that_the_loss_closes_over_get_their_gradient(how):
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def closing(fast, slow, data):
        return loops.upper(fast, slow, data) * scale**2

    problem = mf.Problem(loops.inner, closing, loops.start)
    meta = mf.bilevel(problem, solver=loops.solver(), estimator=mf.Unrolled())
    _, want, _ = value_and_grads(mf.over_tasks(meta, **WHOLE))
    wanted, scale.grad = scale.grad, None
    _, got, _ = value_and_grads(mf.over_tasks(meta, **HOWS[how]))
    assert_close(got, want, 1e-12)
    assert_close(scale.grad, wanted, 1e-12)


@pytest.mark.parametrize("last", [1, 4])
@pytest.mark.parametrize("how", ["loop", "chunks of 1", "chunks of 2"])
def test_so_do_those_that_only_a_later_task_uses(how, last):
    """An expert that only some tasks are routed to: the first chunk does not show it."""
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    count = itertools.count(1)
    size = 2 if how == "chunks of 2" else 1

    def upper(fast, slow, data):
        chunk = next(count) % ((5 + size - 1) // size)
        used = chunk == last if last < (5 + size - 1) // size else chunk == 0
        return loops.upper(fast, slow, data) * (scale**2 if used else 1.0)

    problem = mf.Problem(loops.inner, upper, loops.start)
    meta = mf.bilevel(problem, solver=loops.solver(), estimator=mf.Unrolled())
    value_and_grads(mf.over_tasks(meta, **HOWS[how]))
    assert scale.grad is not None and scale.grad != 0


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("which", ["support", "query"])
def test_episode_tensors_that_require_grad_get_their_gradient(which, how):
    def run(**options):
        parts = {
            name: tuple(
                x.clone().requires_grad_() if name == which and x.is_floating_point() else x
                for x in getattr(CASE.episodes, name).tree
            )
            for name in ("support", "query")
        }
        episodes = mf.Episode(mf.PerStep(parts["support"]), mf.PerStep(parts["query"]))
        _, grads, _ = value_and_grads(mf.over_tasks(meta_of(), **options), episodes=episodes)
        return grads, [x.grad for x in parts[which] if x.is_floating_point()]

    (got, data), (want, wanted) = run(**HOWS[how]), run(**WHOLE)
    assert_close(got, want, 1e-12)
    assert_close(data, wanted, 1e-12)


@pytest.mark.parametrize("how", HOWS)
def test_outer_may_be_empty(how):
    """`outer={}`: the module's own parameters, through closures."""
    module = nn.Linear(3, 1).double()
    data = torch.randn(5, 6, 3, dtype=torch.float64), torch.randn(5, 6, 1, dtype=torch.float64)

    def inner(fast, slow, batch):
        x, y = batch
        return ((module(x) + fast["shift"] - y) ** 2).mean()

    def init(slow, support):
        return {"shift": torch.zeros(1, dtype=torch.float64) + module.bias * 0}

    meta = mf.bilevel(
        mf.Problem(inner, inner, init), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled()
    )

    def run(**options):
        module.zero_grad()
        mf.over_tasks(meta, **options)({}, mf.Episode(data, data))[0].backward()
        return [p.grad.clone() for p in module.parameters()]

    assert_close(run(**HOWS[how]), run(**WHOLE), 1e-12)
    with pytest.raises(mf.errors.ProblemError, match=r"outer=\{\}"):
        explicit = mf.bilevel(
            mf.Problem(inner, inner, init),
            solver=mf.SGD(0.1, 2),
            estimator=mf.Unrolled(recompute=True),
        )
        mf.over_tasks(explicit, **HOWS[how])({}, mf.Episode(data, data))


@pytest.mark.parametrize("how", HOWS)
def test_only_some_outer_parameters_require_grad(how):
    def run(**options):
        outer = {k: v.clone() for k, v in CASE.outer.items()}
        outer["w1"].requires_grad_()
        outer["log_lr"].requires_grad_()
        mf.over_tasks(meta_of(), **options)(outer, CASE.episodes)[0].backward()
        assert outer["w2"].grad is None
        return [outer["w1"].grad, outer["log_lr"].grad]

    assert_close(run(**HOWS[how]), run(**WHOLE), 1e-12)


@pytest.mark.parametrize("how", HOWS)
def test_frozen_parameters_do_not_adapt_and_get_no_gradient(how):
    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    net[0].requires_grad_(False)
    data = torch.randn(5, 6, 8, dtype=torch.float64), torch.randn(5, 6, 1, dtype=torch.float64)

    def loss(fast, slow, batch):
        x, y = batch
        return ((torch.func.functional_call(net, {**slow, **fast}, (x,)) - y) ** 2).mean()

    meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())
    outer = dict(net.named_parameters())
    tasks = mf.over_tasks(meta, **HOWS[how])
    grads, (_, aux) = mf.hypergrad(tasks)(outer, mf.Episode(data, data))
    assert sorted(aux.params) == ["2.bias", "2.weight"]
    assert list(grads) == list(outer)
    assert all((grads[k] == 0).all() for k in ("0.weight", "0.bias"))
    tasks(outer, mf.Episode(data, data))[0].backward()
    for k, v in outer.items():
        if k.startswith("0"):
            assert v.grad is None
        else:
            assert_close(v.grad, grads[k], 1e-13)


# --- random numbers -----------------------------------------------------------------------------


def noisy(fast, slow, data):
    keep = torch.nn.functional.dropout(torch.ones_like(data[0][0]), 0.5)
    return loops.inner(fast, slow, (data[0] * keep, *data[1:]))


NOISY = mf.Problem(noisy, loops.upper, loops.start)


def noisy_meta(**options):
    meta = mf.bilevel(NOISY, solver=loops.solver(), estimator=mf.Unrolled())
    return mf.over_tasks(meta, **options)


def seeded(meta, seed=0, way=value_and_grads):
    torch.manual_seed(seed)
    return way(meta)


@pytest.mark.parametrize("how", ["auto", "chunks of 2"])
def test_random_numbers_in_vmap_are_refused_unless_one_says_which(how):
    with pytest.raises(mf.errors.TransformError, match="randomness="):
        value_and_grads(noisy_meta(**HOWS[how]))


@pytest.mark.parametrize("how", [*HOWS, "whole"])
def test_the_same_numbers_for_all_tasks_whatever_the_chunks(how):
    options = WHOLE if how == "whole" else HOWS[how]
    got = seeded(noisy_meta(randomness="same", **options))
    want = seeded(noisy_meta(randomness="same", **WHOLE))
    assert_close(got[0], want[0], 1e-13)
    assert_close(got[1], want[1], 1e-12)
    # The same episode five times: five times the same.
    twins = mf.stack_episodes([CASE.episode()] * 5)
    torch.manual_seed(0)
    losses = torch.no_grad()(noisy_meta(randomness="same", **options))(CASE.outer, twins)[
        1
    ].inner_losses
    assert_close(losses, losses[:1].expand(5, -1), 1e-13)


@pytest.mark.parametrize("how", ["chunks of 2", "auto", "whole"])
def test_different_numbers_for_each_task(how):
    options = WHOLE if how == "whole" else HOWS[how]
    twins = mf.stack_episodes([CASE.episode()] * 5)
    losses = torch.no_grad()(noisy_meta(randomness="different", **options))(CASE.outer, twins)[
        1
    ].inner_losses
    assert len(set(losses[:, 0].tolist())) > 1


def test_auto_is_one_chunk_where_numbers_differ(monkeypatch):
    """The numbers of a task do not depend on a size that nobody asked for."""
    monkeypatch.setattr("metafocus.tasks.chunks.CHUNK", 2)
    got = seeded(noisy_meta(randomness="different"))
    want = seeded(noisy_meta(randomness="different", **WHOLE))
    assert_close(got[0], want[0], 0.0)
    assert_close(got[1], want[1], 0.0)
    # With "same" nothing depends on the chunks, and there are several.
    got = seeded(noisy_meta(randomness="same"))
    want = seeded(noisy_meta(randomness="same", **WHOLE))
    assert_close(got[1], want[1], 1e-12)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("how", ["loop", "chunks of 2"])
def test_second_derivatives_draw_the_same_numbers_again(how, randomness):
    """Against central differences of the seeded gradient: no other way of ours is trusted."""
    meta = noisy_meta(randomness=randomness, **HOWS[how])

    def gradient(w1):
        torch.manual_seed(3)
        leaves = {**CASE.outer, "w1": w1}
        loss, _ = meta(leaves, CASE.episodes)
        return loss

    def first(w1):
        leaf = w1.detach().requires_grad_()
        return torch.autograd.grad(gradient(leaf), leaf)[0]

    leaf = CASE.outer["w1"].clone().requires_grad_()
    along = torch.ones_like(leaf)
    slope = torch.autograd.grad(gradient(leaf), leaf, create_graph=True)[0]
    torch.randn(7)  # The state in between does not matter.
    got = torch.autograd.grad((slope * along).sum(), leaf)[0]
    step = 1e-5
    want = (first(leaf + step * along) - first(leaf - step * along)) / (2 * step)
    assert_close(got, want, 1e-7)


def test_a_generator_of_its_own_is_found_where_it_would_be_lost():
    """EvoGrad's generator moves on: a second derivative would be of another loss."""
    estimator = mf.EvoGrad(0.3, generator=torch.Generator().manual_seed(0))
    meta = mf.over_tasks(meta_of(estimator), how="loop")
    leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
    loss, _ = meta(leaves, CASE.episodes)
    torch.autograd.grad(loss, leaves["w1"], retain_graph=True)
    slope = torch.autograd.grad(loss, leaves["w1"], create_graph=True)[0]
    with pytest.raises(mf.errors.ProblemError, match=r"run again.*generator"):
        torch.autograd.grad(slope.sum(), leaves["w1"])


def test_the_global_state_moves_on_as_if_there_were_no_chunks():
    states = []
    for how in ("loop", "chunks of 2", "whole"):
        torch.manual_seed(0)
        options = WHOLE if how == "whole" else HOWS[how]
        value_and_grads(noisy_meta(randomness="same", **options))
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("how", "map"),
        ("how", None),
        ("aux", "some"),
        ("aux", True),
        ("randomness", "equal"),
        ("chunk_size", 0),
        ("chunk_size", -3),
        ("chunk_size", 1.5),
        ("chunk_size", True),
        ("chunk_size", "all"),
    ],
)
def test_settings_out_of_range(option, value):
    with pytest.raises(ValueError, match=rf"{option} must be.*{value!r}"):
        mf.over_tasks(meta_of(), **{option: value})


@pytest.mark.parametrize("how", HOWS)
def test_a_bad_task_is_named(how):
    x, y, index = CASE.episodes.support.tree
    y = y.clone()
    y[3, 1] = float("nan")
    episodes = mf.Episode(mf.PerStep((x, y, index)), CASE.episodes.query)
    with pytest.raises(mf.errors.NonFiniteError, match=r"[Tt]ask 3.*step 1"):
        value_and_grads(mf.over_tasks(meta_of(), **HOWS[how]), episodes=episodes)


class Net(torch.nn.Module):
    """A recurrent one, or one that looks at a value."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.rnn = torch.nn.GRU(1, 2) if kind == "GRU" else torch.nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.rnn(x.unsqueeze(0))
        if self.kind == "GRU":
            return y[0].sum(-1)
        large = y.sum().item() > 0 if self.kind == "item" else y.sum() > 0
        return y.sum(-1) if large else -y.sum(-1)


@pytest.mark.parametrize("kind", ["GRU", "item", "branch"])
def test_what_vmap_cannot_do_runs_task_by_task(kind):
    net = Net(kind)

    def loss(fast, slow, x):
        return (torch.func.functional_call(net, fast, (x,)) ** 2).mean()

    meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.1, 1), estimator=mf.Unrolled())
    tasks, outer = mf.Episode(torch.ones(3, 4, 1), torch.ones(3, 4, 1)), mf.trainable(net)
    with pytest.raises(mf.errors.TransformError, match=r'several tasks at once.*how="loop"'):
        mf.over_tasks(meta)(outer, tasks)
    value, _ = mf.over_tasks(meta, how="loop")(outer, tasks)
    value.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in outer.values())
