"""Streams: data that differ from step to step, under every estimator and way to differentiate."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import loops
import pytest
import torch
from loops import (
    PROBLEM,
    STREAMS,
    Single,
    batches_of,
    by_hand,
    hypergradient,
    meta_of,
    slices,
    start,
    stream_of,
    upper,
    value,
)
from problems import Case, assert_close
from ways import MANY, ONE, STEPS, UNROLLED, WAYS, expected, tolerance

import metafocus as mf

CASE = loops.case()


@functools.cache
def wanted(last):
    """By task: the support is a stream, the query of the last step counts."""

    def one(outer, episode):
        return value(outer, slices(episode.support), slices(episode.query)[-1], last)

    episodes = [CASE.episode(i) for i in range(CASE.tasks)]
    return [hypergradient(CASE.outer, lambda o, e=e: one(o, e)) for e in episodes]


# --- PerStep ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", UNROLLED)
def test_each_step_sees_its_slice(name, way):
    estimator, last = UNROLLED[name]
    got = WAYS[way](meta_of(estimator), CASE)
    assert_close(got, expected(wanted(last), way), tolerance(name))


def test_slices_beyond_the_last_step_are_not_looked_at():
    long = loops.case(steps=STEPS + 3)
    for name in ("FirstOrder", "graph", "recompute=3", "forward"):
        estimator, last = UNROLLED[name]
        meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator)
        episode = long.episode()
        batches = slices(episode.support)[:STEPS]
        query = slices(episode.query)[STEPS - 1]
        want = hypergradient(long.outer, lambda o, b=batches, q=query, k=last: value(o, b, q, k))
        assert_close(ONE["backward"](meta, long), want, tolerance(name))


# Data that require grad: the derivative by the support and by the query, slice by slice.


def data_wanted(episode, last):
    """The derivatives by the tensors of the support and of the query of one episode."""

    def leaf(x):
        return x.clone().requires_grad_()

    (x, y, index), (xq, yq) = episode.support.tree, episode.query.tree
    x, y, xq, yq = map(leaf, (x, y, xq, yq))
    batches = [(x[t], y[t], index[t]) for t in range(STEPS)]
    outer = {k: leaf(v) for k, v in CASE.outer.items()}
    loss = value(outer, batches, (xq[-1], yq[-1]), last)
    return torch.autograd.grad(loss, (x, y, xq, yq), allow_unused=True, materialize_grads=True)


def data_case():
    (x, y, index), (xq, yq) = CASE.episodes.support.tree, CASE.episodes.query.tree
    data = [v.clone().requires_grad_() for v in (x, y, xq, yq)]
    x, y, xq, yq = data
    return data, mf.Episode(mf.PerStep((x, y, index)), mf.PerStep((xq, yq)))


def _over_tasks(meta, **options):
    data, episodes = data_case()
    mf.over_tasks(meta, **options)(CASE.outer, episodes)[0].backward()
    return [torch.zeros_like(v) if v.grad is None else v.grad * CASE.tasks for v in data]


def _backward_each(meta):
    data, episodes = data_case()
    for i in range(CASE.tasks):
        parts = [mf.PerStep(tuple(v[i] for v in part.tree)) for part in episodes]
        meta(CASE.outer, mf.Episode(*parts))[0].backward()
    return [torch.zeros_like(v) if v.grad is None else v.grad for v in data]


def _episode_of(x, y, xq, yq, index):
    return mf.Episode(mf.PerStep((x, y, index)), mf.PerStep((xq, yq)))


def _vmap_of_grad(meta):
    data, episodes = data_case()
    index = episodes.support.tree[2]

    def loss(x, y, xq, yq, index):
        return meta(CASE.outer, _episode_of(x, y, xq, yq, index))[0]

    gradient = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    return torch.func.vmap(gradient)(*(v.detach() for v in data), index)


def _grad_of_vmap(meta):
    data, episodes = data_case()
    index = episodes.support.tree[2]

    def loss(*parts):
        episodes = _episode_of(*parts, index)
        return mf.over_tasks(meta)(CASE.outer, episodes)[0] * CASE.tasks

    return torch.func.grad(loss, argnums=(0, 1, 2, 3))(*(v.detach() for v in data))


DATA_WAYS = {
    "backward": _backward_each,
    "vmap(grad)": _vmap_of_grad,
    "grad(vmap)": _grad_of_vmap,
    "backward(vmap)": _over_tasks,
    "backward(chunks)": functools.partial(_over_tasks, chunk_size=2),
    "backward(loop)": functools.partial(_over_tasks, how="loop"),
}


@pytest.mark.parametrize("way", DATA_WAYS)
@pytest.mark.parametrize("name", UNROLLED)
def test_data_that_require_grad_get_their_gradient(name, way):
    estimator, last = UNROLLED[name]
    found = DATA_WAYS[way](meta_of(estimator))
    want = [data_wanted(CASE.episode(i), last) for i in range(CASE.tasks)]
    for got, parts in zip(found, zip(*want, strict=True), strict=True):
        assert_close(got, torch.stack(parts), tolerance(name))


# --- streams that are functions -----------------------------------------------------------------


@pytest.mark.parametrize("way", ONE)
@pytest.mark.parametrize("kind", STREAMS[1:])
@pytest.mark.parametrize("name", UNROLLED)
def test_other_streams_are_asked_step_by_step(name, kind, way):
    estimator, last = UNROLLED[name]
    whole = CASE.episode()
    one = Single(PROBLEM, CASE.outer, mf.Episode(stream_of(kind, whole.support), whole.query))
    assert_close(ONE[way](meta_of(estimator), one), wanted(last)[0], tolerance(name))


SHARED_WAYS = ("grad(vmap)", "backward(vmap)", "backward(chunks)", "backward(loop)")


@pytest.mark.parametrize("way", SHARED_WAYS)
@pytest.mark.parametrize("name", UNROLLED)
def test_a_shared_stream_is_the_same_for_all_tasks(name, way):
    estimator, last = UNROLLED[name]
    stream = batches_of(slices(CASE.episode(0).support))
    episodes = mf.Episode(mf.shared(stream), CASE.episodes.query)
    want = [
        hypergradient(
            CASE.outer,
            lambda o, i=i: value(
                o, slices(CASE.episode(0).support), slices(CASE.episode(i).query)[-1], last
            ),
        )
        for i in range(CASE.tasks)
    ]
    got = MANY[way](meta_of(estimator), Case(PROBLEM, CASE.outer, episodes))
    assert_close(got, expected(want, way), tolerance(name))


def test_a_shared_query():
    query = mf.Batches(lambda step: slices(CASE.episode(0).query)[step], STEPS)
    episodes = mf.Episode(CASE.episodes.support, mf.shared(query))
    want = [
        hypergradient(
            CASE.outer,
            lambda o, i=i: value(o, slices(CASE.episode(i).support), query.at(STEPS - 1)),
        )
        for i in range(CASE.tasks)
    ]
    for way in SHARED_WAYS:
        got = MANY[way](meta_of(mf.Unrolled()), Case(PROBLEM, CASE.outer, episodes))
        assert_close(got, expected(want, way), 1e-11)


@pytest.mark.parametrize("kind", ["Batches", "own"])
@pytest.mark.parametrize("how", ["vmap", "loop"])
def test_tasks_refuse_a_stream_that_is_not_shared(kind, how):
    episodes = mf.Episode(stream_of(kind, CASE.episode().support), CASE.episodes.query)
    meta = mf.over_tasks(meta_of(mf.Unrolled()), how=how)
    name = {"Batches": "Batches", "own": "Own"}[kind]
    with pytest.raises(mf.errors.ProblemError, match=rf"{name} cannot be stacked.*mf\.shared"):
        meta(CASE.outer, episodes)
    swapped = mf.Episode(episodes.query, episodes.support)
    with pytest.raises(mf.errors.ProblemError, match=rf"{name} cannot be stacked.*mf\.shared"):
        meta(CASE.outer, swapped)


def test_only_a_stream_can_be_shared():
    with pytest.raises(mf.errors.ProblemError, match=r"shared needs a stream.*tuple"):
        mf.shared((torch.zeros(2), torch.zeros(2)))


def test_stacked_episodes_keep_streams():
    parts = [CASE.episode(i) for i in range(CASE.tasks)]
    got = mf.stack_episodes(parts)
    assert isinstance(got.support, mf.PerStep) and isinstance(got.query, mf.PerStep)
    pairs = zip(got.support.tree, CASE.episodes.support.tree, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    stream = mf.shared(batches_of(slices(parts[0].support)))
    both = mf.stack_episodes([mf.Episode(stream, e.query) for e in parts])
    assert both.support is stream


# --- init, prepare and adapt see the stream itself ----------------------------------------------


def test_init_and_prepare_see_the_stream():
    seen = []

    def init(slow, support):
        seen.append(("init", type(support)))
        return start(slow, support)

    def prepare(slow, episode):
        seen.append(("prepare", type(episode.support)))
        return episode

    problem = mf.Problem(loops.inner, upper, init, prepare)
    meta = mf.bilevel(problem, solver=loops.solver(), estimator=mf.Unrolled())
    torch.no_grad()(meta)(CASE.outer, CASE.episode())
    assert seen == [("prepare", mf.PerStep), ("init", mf.PerStep)]


@pytest.mark.parametrize("kind", STREAMS)
def test_adapt_takes_a_stream(kind):
    episode = CASE.episode()
    support = stream_of(kind, episode.support)
    got = mf.adapt(PROBLEM, CASE.outer, support, solver=loops.solver())
    leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
    want = by_hand(start(leaves, None), leaves, slices(episode.support))[-1]
    assert_close(got.params, loops.constants(want), 1e-13)


@pytest.mark.parametrize("name", [n for n in UNROLLED if not n.startswith("finite")])
def test_a_prepared_stream_that_depends_on_outer(name):
    """Data made from the slow weights, as in data augmentation that is learned."""

    def prepare(slow, episode):
        x, y, index = episode.support.tree
        return mf.Episode(mf.PerStep((x + slow["w2"].sum(), y, index)), episode.query)

    problem = mf.Problem(loops.inner, upper, start, prepare)
    estimator, last = UNROLLED[name]
    meta = mf.bilevel(problem, solver=loops.solver(), estimator=estimator)

    def by_task(outer, episode):
        batches = [(x + outer["w2"].sum(), y, i) for x, y, i in slices(episode.support)]
        return value(outer, batches, slices(episode.query)[-1], last)

    want = [
        hypergradient(CASE.outer, lambda o, i=i: by_task(o, CASE.episode(i)))
        for i in range(CASE.tasks)
    ]
    for way, differentiate in WAYS.items():
        assert_close(differentiate(meta, CASE), expected(want, way), tolerance(name))


# --- what a stream hides ------------------------------------------------------------------------

EXPLICIT = {k: v for k, (v, _) in UNROLLED.items() if v.explicit}
REBUILD = EXPLICIT | {
    "Implicit": mf.Implicit(data=lambda stream: stream.at(0)),
    "Penalty": mf.Penalty(100.0, data=lambda stream: stream.at(0)),
    "each product": mf.Implicit(mf.Neumann(2, 0.1), data="each product"),
}


def hidden_in_batches(x):
    """A stream over a tensor that requires grad, which the engine cannot see."""
    parts = slices(CASE.episode().support)
    return mf.Batches(lambda step: (parts[step % STEPS][0] * x, *parts[step % STEPS][1:]), 99)


@pytest.mark.parametrize("name", REBUILD)
def test_a_stream_over_a_tensor_that_requires_grad_is_refused_where_it_would_be_lost(name):
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    episode = mf.Episode(hidden_in_batches(x), CASE.episode().query)
    with pytest.raises(mf.errors.ClosureError, match="stream"):
        meta_of(REBUILD[name])(CASE.outer, episode)


@pytest.mark.parametrize("name", REBUILD)
def test_so_is_a_prepared_stream_over_the_slow_weights(name):
    def prepare(slow, episode):
        parts = slices(episode.support)
        fetch = lambda step: (parts[step % STEPS][0] * slow["w2"].sum(), *parts[step % STEPS][1:])  # noqa: E731
        return mf.Episode(mf.Batches(fetch, 99), episode.query)

    problem = mf.Problem(loops.inner, upper, start, prepare)
    for way in ONE.values():
        meta = mf.bilevel(problem, solver=loops.solver(), estimator=REBUILD[name])
        with pytest.raises(mf.errors.ClosureError, match="stream"):
            way(meta, CASE)


def test_on_the_tape_a_stream_over_a_tensor_that_requires_grad_is_right():
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    episode = mf.Episode(hidden_in_batches(x), CASE.episode().query)
    meta_of(mf.Unrolled())(CASE.outer, episode)[0].backward()
    again = torch.ones((), dtype=torch.float64, requires_grad=True)
    leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
    batches = [hidden_in_batches(again).at(t) for t in range(STEPS)]
    value(leaves, batches, slices(CASE.episode().query)[-1]).backward()
    assert_close(x.grad, again.grad, 1e-11)


# --- streams that are not pure ------------------------------------------------------------------


def impure(change):
    """A stream that returns `change(data, n)` at its call number `n`."""
    calls = iter(range(1000))
    parts = slices(CASE.episode().support)
    return mf.Batches(lambda step: change(parts[step % STEPS], next(calls)), 99)


CHANGES = {
    "other numbers": lambda data, n: (data[0] + n, *data[1:]),
    "one number": lambda data, n: (data[0], data[1] + (torch.arange(5) == 0) * 1e-6 * n, data[2]),
    "other rows": lambda data, n: tuple(x.roll(n, 0) for x in data),
    # The sum of integers does not depend on their order.
    "labels in another order": lambda data, n: (*data[:2], data[2].roll(n, 0)),
    "other integers": lambda data, n: (*data[:2], (data[2] + n) % loops.SAMPLES),
    "fewer rows": lambda data, n: tuple(x[: 5 if n <= STEPS else 2] for x in data),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", EXPLICIT)
def test_an_impure_stream_is_found_at_the_first_rebuilt_batch(name, change):
    if EXPLICIT[name].recompute and EXPLICIT[name].recompute > STEPS:
        pytest.skip("one segment, which keeps its graph: nothing is rebuilt")
    for way in ONE.values():
        episode = mf.Episode(impure(CHANGES[change]), CASE.episode().query)
        one = Single(PROBLEM, CASE.outer, episode)
        with pytest.raises(mf.errors.ProblemError, match=r"step \d.*\.at\(step\) must be pure"):
            way(meta_of(EXPLICIT[name]), one)


@pytest.mark.parametrize("name", [k for k in UNROLLED if k not in EXPLICIT])
def test_without_a_rebuild_an_impure_stream_is_no_matter(name):
    """Each step is asked for once, after the trial of step 0: random augmentations are allowed."""
    asked = []
    parts = slices(CASE.episode().support)

    def fetch(step):
        asked.append(step)
        return tuple(x + 0.01 * len(asked) if x.is_floating_point() else x for x in parts[step])

    episode = mf.Episode(mf.Batches(fetch, STEPS), CASE.episode().query)
    mf.hypergrad(meta_of(UNROLLED[name][0]))(CASE.outer, episode)
    assert asked == [0, *range(STEPS)]


PURE = {
    "NaN": lambda data: (*data[:2], data[2], torch.tensor([1.0, float("nan"), float("inf")])),
    "booleans": lambda data: (*data, torch.tensor([True, False])),
    "complex": lambda data: (*data, torch.tensor([1j, 2 + 3j])),
    "no entries": lambda data: (*data, torch.zeros(0, 3)),
    "sparse": lambda data: (*data, torch.eye(3).to_sparse()),
    "bytes": lambda data: (*data, torch.tensor([1, 255], dtype=torch.uint8)),
    "text": lambda data: (*data, "a sentence", None, 3),
    "half": lambda data: (*data, torch.tensor([1.5], dtype=torch.bfloat16)),
    "large": lambda data: (*data, torch.full((4,), 1e38)),
}


@pytest.mark.parametrize("kind", PURE)
def test_a_pure_stream_of_any_data_is_let_through(kind):
    def loss(fast, slow, data):
        return loops.inner(fast, slow, data[:3])

    problem = mf.Problem(loss, upper, start)
    parts = slices(CASE.episode().support)
    episode = mf.Episode(
        mf.Batches(lambda step: PURE[kind](parts[step]), STEPS), CASE.episode().query
    )
    for name in ("recompute", "recompute=2", "forward"):
        meta = mf.bilevel(problem, solver=loops.solver(), estimator=UNROLLED[name][0])
        got = mf.hypergrad(meta)(CASE.outer, episode)[0]
        assert_close(got, wanted(None)[0], tolerance(name))


def test_a_stream_in_windows_that_is_not_pure_is_refused():
    windows = mf.algorithms.Windows(PROBLEM, solver=loops.solver(), recompute=True)
    episode = mf.Episode(impure(CHANGES["other numbers"]), CASE.episode().query)
    leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
    loss, _ = windows.loss(leaves, windows.init(leaves, episode.support), episode)
    with pytest.raises(mf.errors.ProblemError, match=r"\.at\(step\) must be pure"):
        loss.backward()


def test_a_rebuild_of_the_tasks_is_compared_too():
    """A second derivative through chunks runs them again: an impure shared stream would differ."""
    stream = impure(CHANGES["other numbers"])
    episodes = mf.Episode(mf.shared(stream), CASE.episodes.query)
    leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
    loss, _ = mf.over_tasks(meta_of(mf.Unrolled()), chunk_size=1)(leaves, episodes)
    slope = torch.autograd.grad(loss, leaves["w1"], create_graph=True)[0]
    with pytest.raises(mf.errors.ProblemError, match="run again"):
        torch.autograd.grad(slope.sum(), leaves["w1"])


# --- too few steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNROLLED)
def test_a_stream_shorter_than_the_steps_is_refused(name):
    estimator = UNROLLED[name][0]
    short = loops.case(steps=STEPS - 1)
    for way in WAYS.values():
        with pytest.raises(mf.errors.ProblemError, match=rf"PerStep has no data.*step {STEPS - 1}"):
            way(meta_of(estimator), short)
    episode = short.episode()
    batches = mf.Batches(lambda step: slices(episode.support)[step], STEPS - 1)
    with pytest.raises(mf.errors.ProblemError, match=rf"Batches holds 3 steps.*step {STEPS - 1}"):
        meta_of(estimator)(CASE.outer, mf.Episode(batches, CASE.episode().query))


def test_a_query_shorter_than_the_steps_is_refused():
    episode = mf.Episode(CASE.episode().support, loops.case(steps=STEPS - 1).episode().query)
    for path in (None, [1.0] * STEPS):
        with pytest.raises(mf.errors.ProblemError, match="PerStep has no data"):
            meta_of(mf.Unrolled(), path=path)(CASE.outer, episode)


def test_a_tensor_without_an_axis_of_steps_is_refused():
    (x, y, index), query = CASE.episode().support.tree, CASE.episode().query
    episode = mf.Episode(mf.PerStep((x, y, index, torch.tensor(1.0))), query)
    with pytest.raises(mf.errors.ProblemError, match=r"leading axis.*\[\]"):
        meta_of(mf.Unrolled())(CASE.outer, episode)


def test_adapt_refuses_a_short_stream():
    short = loops.case(steps=STEPS - 1).episode()
    with pytest.raises(mf.errors.ProblemError, match="PerStep has no data"):
        mf.adapt(PROBLEM, CASE.outer, short.support, solver=loops.solver())


# --- streams whose tensors can be seen, and tensors that cannot ---------------------------------


@dataclass(frozen=True)
class Visible:
    """A user's stream that is a pytree: its tensors are leaves, as those of `mf.PerStep`."""

    x: torch.Tensor
    rest: tuple[torch.Tensor, ...]

    def at(self, step):
        return (self.x[step], *(v[step] for v in self.rest))


torch.utils._pytree.register_pytree_node(
    Visible,
    lambda stream: ([stream.x, stream.rest], None),
    lambda children, _: Visible(*children),
    serialized_type_name="tests.Visible",
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["FirstOrder", "graph", "recompute", "recompute=3", "forward"])
def test_a_stream_that_is_a_pytree_is_stacked_and_differentiated(name, way):
    x, *rest = CASE.episodes.support.tree
    episodes = mf.Episode(Visible(x, tuple(rest)), CASE.episodes.query)
    estimator, last = UNROLLED[name]
    got = WAYS[way](meta_of(estimator), Case(PROBLEM, CASE.outer, episodes))
    assert_close(got, expected(wanted(last), way), tolerance(name))
    if last == 0:
        return  # nothing depends on the support
    one = x[0].clone().requires_grad_()
    episode = mf.Episode(Visible(one, tuple(v[0] for v in rest)), CASE.episode().query)
    meta_of(estimator)(CASE.outer, episode)[0].backward()
    assert_close(one.grad, data_wanted(CASE.episode(), last)[0], tolerance(name))


@pytest.mark.parametrize("name", EXPLICIT)
def test_a_stream_over_tensors_that_vmap_maps_is_refused_where_it_would_be_lost(name):
    """`prepare` makes a stream of functions out of stacked tensors."""

    def prepare(slow, episode):
        parts = episode.support
        return mf.Episode(mf.Batches(lambda t: tuple(v[t] for v in parts), STEPS), episode.query)

    problem = mf.Problem(loops.inner, upper, start, prepare)
    episodes = mf.Episode(CASE.episodes.support.tree, CASE.episodes.query)
    meta = mf.bilevel(problem, solver=loops.solver(), estimator=EXPLICIT[name])
    case = Case(problem, CASE.outer, episodes)
    for way in ("vmap(grad)", "grad(vmap)", "backward(vmap)", "backward(chunks)"):
        with pytest.raises(mf.errors.ClosureError, match=r"stream.*differ from task to task"):
            WAYS[way](meta, case)
    # One task after another there is no vmap.
    got = WAYS["backward(loop)"](meta, case)
    last = UNROLLED[name][1]
    assert_close(got, expected(wanted(last), "backward(loop)"), tolerance(name))
