"""Streams: data that differ from step to step, under every estimator and way to differentiate."""

from __future__ import annotations

import copy
import functools

import loops
import pytest
import torch
from loops import PROBLEM, by_hand, hypergradient, slices, start, upper
from problems import assert_close
from ways import MANY, ONE, STEPS, UNROLLED, WAYS, expected, tolerance

import metafocus as mf

CASE = loops.case()


def value(outer, batches, query, last=None):
    """The outer loss after the steps on these batches, by hand."""
    return upper(by_hand(start(outer, None), outer, batches, last)[-1], outer, query)


@functools.cache
def wanted(last):
    """By task: the support is a stream, the query of the last step counts."""

    def one(outer, episode):
        return value(outer, slices(episode.support), slices(episode.query)[-1], last)

    episodes = [CASE.episode(i) for i in range(CASE.tasks)]
    return [hypergradient(CASE.outer, lambda o, e=e: one(o, e)) for e in episodes]


def meta_of(estimator, **options):
    return mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator, **options)


# --- PerStep -----------------------------------------------------------------------------------


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


# --- streams that are functions ------------------------------------------------------------------


def batches_of(episode) -> mf.Batches:
    """The same data, fetched step by step: a new tensor at every call."""
    parts = slices(episode.support)
    return mf.Batches(lambda step: tuple(x.clone() for x in parts[step]), STEPS)


class Own:
    """A user's stream: any object with `.at(step)`."""

    def __init__(self, episode):
        self.parts = slices(episode.support)

    def at(self, step):
        return self.parts[step]


STREAMS = {
    "Batches": batches_of,
    "own": Own,
    "shared": lambda episode: mf.shared(episode.support),
}


@pytest.mark.parametrize("way", ONE)
@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("name", UNROLLED)
def test_other_streams_are_asked_step_by_step(name, kind, way):
    estimator, last = UNROLLED[name]
    whole = CASE.episode()
    one = loops.Case(PROBLEM, CASE.outer, CASE.episodes)
    episode = mf.Episode(STREAMS[kind](whole), whole.query)
    object.__setattr__(one, "episode", lambda i: episode)
    assert_close(ONE[way](meta_of(estimator), one), wanted(last)[0], tolerance(name))


SHARED_WAYS = ("grad(vmap)", "backward(vmap)", "backward(chunks)", "backward(loop)")


@pytest.mark.parametrize("way", SHARED_WAYS)
@pytest.mark.parametrize("name", UNROLLED)
def test_a_shared_stream_is_the_same_for_all_tasks(name, way):
    estimator, last = UNROLLED[name]
    stream = batches_of(CASE.episode(0))
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
    got = MANY[way](meta_of(estimator), loops.Case(PROBLEM, CASE.outer, episodes))
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
        got = MANY[way](meta_of(mf.Unrolled()), loops.Case(PROBLEM, CASE.outer, episodes))
        assert_close(got, expected(want, way), 1e-11)


@pytest.mark.parametrize("kind", ["Batches", "own"])
@pytest.mark.parametrize("how", ["vmap", "loop"])
def test_tasks_refuse_a_stream_that_is_not_shared(kind, how):
    episodes = mf.Episode(STREAMS[kind](CASE.episode()), CASE.episodes.query)
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
    assert all(torch.equal(a, b) for a, b in zip(got.support.tree, CASE.episodes.support.tree))
    stream = mf.shared(batches_of(parts[0]))
    both = mf.stack_episodes([mf.Episode(stream, e.query) for e in parts])
    assert both.support is stream


# --- init, prepare and adapt see the stream itself -------------------------------------------------


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
    meta(CASE.outer, CASE.episode())
    assert seen == [("prepare", mf.PerStep), ("init", mf.PerStep)]


@pytest.mark.parametrize("kind", ["PerStep", *STREAMS])
def test_adapt_takes_a_stream(kind):
    episode = CASE.episode()
    support = episode.support if kind == "PerStep" else STREAMS[kind](episode)
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


# --- what a stream hides -------------------------------------------------------------------------

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


# --- streams that are not pure ----------------------------------------------------------------------


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
        one = loops.Case(PROBLEM, CASE.outer, CASE.episodes)
        episode = mf.Episode(impure(CHANGES[change]), CASE.episode().query)
        object.__setattr__(one, "episode", lambda i, e=episode: e)
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
    with pytest.raises(mf.errors.ProblemError, match="run again"):
        torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)


# --- too few steps ---------------------------------------------------------------------------------


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


# --- estimators of the solution ------------------------------------------------------------------


def descended(fast, slow, data):
    """A map with the same fixed point as descent on the inner loss."""
    gradient = torch.func.grad(lambda f: loops.inner(f, slow, data))(fast)
    return {k: v - 0.1 * gradient[k] for k, v in fast.items()}


def first_batch(stream):
    return stream.at(0)


WITHOUT = {
    "Implicit": lambda **data: mf.Implicit(mf.CG(3), **data),
    "FixedPoint": lambda **data: mf.FixedPoint(descended, mf.Neumann(3, 1.0), **data),
    "OneStep": lambda **data: mf.OneStep(descended, **data),
    "Penalty": lambda **data: mf.Penalty(100.0, **data),
}
ANY_STREAM = {"PerStep": lambda episode: episode.support} | STREAMS


@pytest.mark.parametrize("kind", ANY_STREAM)
@pytest.mark.parametrize("name", WITHOUT)
def test_estimators_of_the_solution_refuse_a_stream_by_name(name, kind):
    episode = mf.Episode(ANY_STREAM[kind](CASE.episode()), CASE.episode().query)
    with pytest.raises(mf.errors.ProblemError, match=rf"{name} .*stream.*Pass data="):
        meta_of(WITHOUT[name]())(CASE.outer, episode)


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WITHOUT)
def test_with_data_they_differentiate_on_what_it_returns(name, way):
    """The same derivative as of the problem with this one batch, at the same solution.

    `mf.Given` brings the solution, so that both problems have it.
    """
    loss = mf.proximal(loops.inner, 1.0)

    def solution(slow, stream):
        return {k: slow[k] + 0.1 for k in ("w1", "w2")}

    problem = mf.Problem(loss, upper, start)
    nudging = {"solver": mf.SGD(0.1, 20)} if name == "Penalty" else {}
    metas = [
        mf.bilevel(problem, solver=mf.Given(solution), estimator=WITHOUT[name](**nudging, **data))
        for data in ({"data": first_batch}, {})
    ]
    if name == "Penalty":
        # The nudged problem goes down the stream; one batch for all of its steps.
        still = CASE.episodes.support.tree
        many = tuple(x[:, :1].expand(-1, 20, *x.shape[2:]) for x in still)
    else:
        many = CASE.episodes.support.tree
    query = mf.Episode(None, tuple(x[:, 0] for x in CASE.episodes.query.tree)).query
    streamed = loops.Case(problem, CASE.outer, mf.Episode(mf.PerStep(many), query))
    single = tuple(x[:, 0] for x in CASE.episodes.support.tree)
    plain = loops.Case(problem, CASE.outer, mf.Episode(single, query))
    got, want = WAYS[way](metas[0], streamed), WAYS[way](metas[1], plain)
    # The same operations on the same numbers; Penalty enlarges rounding by its strength.
    assert_close(got, want, 1e-10 if name == "Penalty" else 1e-13)


def test_data_may_be_any_function_of_the_stream():
    def everything(stream):
        return tuple(x.flatten(0, 1) for x in stream.tree)

    episode = CASE.episode()
    meta = meta_of(mf.Implicit(mf.CG(3), data=everything))
    with pytest.warns(mf.errors.NotStationaryWarning):
        got = mf.hypergrad(meta)(CASE.outer, episode)[0]
    leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
    fast = by_hand(start(leaves, None), leaves, slices(episode.support))[-1]
    fast = {k: v.detach() for k, v in fast.items()}
    plain = mf.bilevel(
        PROBLEM, solver=mf.Given(lambda slow, s: fast), estimator=mf.Implicit(mf.CG(3))
    )
    last = mf.Episode(everything(episode.support), slices(episode.query)[-1])
    with pytest.warns(mf.errors.NotStationaryWarning):
        assert_close(got, mf.hypergrad(plain)(CASE.outer, last)[0], 1e-12)


# --- stocBiO ---------------------------------------------------------------------------------------


def stocbio(outer, batches, query, scale, terms):
    """`direct - M' x` with `x = scale sum_q prod_(j<q) (I - scale H_j) v`, by hand.

    Every product has the data of its own step, of those after the inner ones; the last of them is
    that of the mixed product.
    """
    leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
    fast = by_hand(start(leaves, None), leaves, batches[:STEPS])[-1]
    fast = {k: v.detach().requires_grad_() for k, v in fast.items()}
    names = list(fast)
    loss = upper(fast, leaves, query)
    both = torch.autograd.grad(
        loss, [*fast.values(), *leaves.values()], allow_unused=True, materialize_grads=True
    )
    right, direct = dict(zip(names, both, strict=False)), both[len(names) :]

    def gradient(step):
        value = loops.inner(fast, leaves, batches[step])
        return torch.autograd.grad(value, list(fast.values()), create_graph=True)

    x = {k: scale * v for k, v in right.items()}
    step = STEPS
    for _ in range(terms - 1):
        product = torch.autograd.grad(gradient(step), list(fast.values()), list(x.values()))
        x = {k: x[k] + scale * (right[k] - p) for k, p in zip(names, product, strict=True)}
        step += 1
    mixed = torch.autograd.grad(
        gradient(step),
        list(leaves.values()),
        list(x.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    return {k: d - m for k, d, m in zip(leaves, direct, mixed, strict=True)}


@pytest.mark.parametrize("hvp", ["reverse", "forward", "finite"])
@pytest.mark.parametrize("terms", [1, 2, 4])
@pytest.mark.parametrize("kind", ["PerStep", "Batches"])
def test_new_data_for_each_product_is_stocbio(kind, terms, hvp):
    from ways import HVPS

    case = loops.case(tasks=3, steps=STEPS + 4)
    estimator = mf.Implicit(mf.Neumann(terms, 0.2), HVPS[hvp], data="each product")
    meta = mf.bilevel(PROBLEM, solver=loops.solver(), estimator=estimator)
    query = tuple(x[:, 0] for x in case.episodes.query.tree)
    supports = [slices(case.episode(i).support) for i in range(case.tasks)]
    want = [
        stocbio(case.outer, batches, tuple(x[i] for x in query), 0.2, terms)
        for i, batches in enumerate(supports)
    ]
    ways = WAYS if kind == "PerStep" else ONE
    for way in ways.values():
        pass
    for way, differentiate in ways.items():
        case_ = loops.Case(PROBLEM, case.outer, mf.Episode(case.episodes.support, query))
        if kind == "Batches":
            stream = mf.Batches(lambda step: supports[0][step], STEPS + 4)
            episode = mf.Episode(stream, tuple(x[0] for x in query))
            object.__setattr__(case_, "episode", lambda i, e=episode: e)
        # Finite differences: u^(2/3) of the third derivative, once for each product.
        assert_close(
            differentiate(meta, case_), expected(want, way), 1e-7 if hvp == "finite" else 1e-11
        )


def test_new_data_for_each_product_needs_neumann_and_a_stream():
    with pytest.raises(ValueError, match=r"each product.*only Neumann.*CG"):
        mf.Implicit(mf.CG(3), data="each product")
    with pytest.raises(ValueError, match=r"data must be.*'every one'"):
        mf.Implicit(mf.Neumann(2, 0.1), data="every one")
    meta = meta_of(mf.Implicit(mf.Neumann(2, 0.1), data="each product"))
    with pytest.raises(mf.errors.ProblemError, match=r"each product.*must be a stream.*tuple"):
        meta(CASE.outer, mf.Episode(slices(CASE.episode().support)[0], CASE.episode().query))


def test_new_data_for_each_product_refuses_what_it_does_not_have():
    case = loops.case(steps=STEPS + 4)
    meta = meta_of(mf.Implicit(mf.Neumann(2, 0.1), data="each product"))
    leaves = {k: v.clone().requires_grad_() for k, v in case.outer.items()}
    loss, _ = meta(leaves, case.episode())
    first = torch.autograd.grad(loss, leaves["w1"], create_graph=True)[0]
    with pytest.raises(mf.errors.TransformError, match="each product.*first derivatives"):
        torch.autograd.grad(first.sum(), leaves["w1"])
    with pytest.raises(mf.errors.TransformError, match="each product.*first derivatives"):
        torch.func.jvp(
            lambda o: meta(o, case.episode())[0], (case.outer,), (copy.deepcopy(case.outer),)
        )


# --- windows and PES: global steps -------------------------------------------------------------------


def windowed(outer, window, batches, query, first):
    """The loss of a window by hand, and its derivative, from where it begins."""

    def loss(slow):
        fast = start(slow, None) if first == 0 else window.fast
        velocity = window.solver_state
        for data in batches[first : first + 2]:
            fast = {
                k: v if v.requires_grad else v.clone().requires_grad_() for k, v in fast.items()
            }
            found = torch.autograd.grad(
                loops.inner(fast, slow, data), list(fast.values()), create_graph=True
            )
            pairs = zip(fast, found, strict=True)
            velocity = {k: loops.MOMENTUM * velocity[k] + g for k, g in pairs}
            fast = {k: v - loops.rate(slow) * velocity[k] for k, v in fast.items()}
        return upper(fast, slow, query[first + 1])

    return hypergradient(outer, loss)


@pytest.mark.parametrize("recompute", [False, True, 2])
@pytest.mark.parametrize("kind", ANY_STREAM)
def test_windows_go_on_in_the_stream(kind, recompute):
    case = loops.case(tasks=1, steps=6)
    whole = case.episode()
    parts = slices(whole.support)
    support = {
        "PerStep": lambda: whole.support,
        "Batches": lambda: mf.Batches(lambda step: parts[step], 6),
        "own": lambda: Own(whole),
        "shared": lambda: mf.shared(whole.support),
    }[kind]()
    episode = mf.Episode(support, whole.query)
    windows = mf.algorithms.Windows(PROBLEM, solver=loops.solver(2), recompute=recompute)
    window = windows.init(case.outer, support)
    for first in (0, 2, 4):
        leaves = {k: v.clone().requires_grad_() for k, v in case.outer.items()}
        loss, (after, _) = windows.loss(leaves, window, episode)
        got = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        want = windowed(case.outer, window, parts, slices(whole.query), first)
        assert_close(dict(zip(leaves, got, strict=True)), want, 1e-11)
        window = after
    with pytest.raises((mf.errors.ProblemError, IndexError)):
        windows.loss(case.outer, window, episode)


@pytest.mark.parametrize("kind", ANY_STREAM)
@pytest.mark.parametrize("algorithm", ["PES", "ESSingle"])
def test_particles_go_on_in_the_stream(algorithm, kind):
    """Every particle's loss is that of the inner loop by hand at its perturbed parameters."""
    case, pairs, sigma = loops.case(tasks=1, steps=6), 2, 0.1
    whole = case.episode()
    parts, queries = slices(whole.support), slices(whole.query)
    support = mf.Batches(lambda step: parts[step], 6) if kind == "Batches" else None
    support = support or (Own(whole) if kind == "own" else whole.support)
    support = mf.shared(whole.support) if kind == "shared" else support
    windows = mf.algorithms.Windows(PROBLEM, solver=loops.solver(2))
    strategy = getattr(mf.algorithms, algorithm)(windows, sigma=sigma, pairs=pairs)
    generator, again = (torch.Generator().manual_seed(3) for _ in range(2))
    state = strategy.init(case.outer, support)
    particles, total, fixed = [None] * 2 * pairs, None, None
    for first in (0, 2, 4):
        episode = mf.Episode(support, whole.query)
        grads, state, aux = strategy.step(case.outer, state, episode, generator=generator)
        noise = {
            k: sigma * torch.randn(pairs, *v.shape, generator=again, dtype=v.dtype)
            for k, v in case.outer.items()
        }
        if algorithm == "ESSingle":
            fixed = noise = fixed or noise
            total = noise
        else:
            total = noise if total is None else {k: total[k] + v for k, v in noise.items()}
        losses = torch.zeros(2, pairs, dtype=torch.float64)
        for sign in (0, 1):
            for i in range(pairs):
                slow = {k: v + (1 - 2 * sign) * noise[k][i] for k, v in case.outer.items()}
                at = particles[sign * pairs + i]
                if at is None:
                    fast = start(slow, None)
                    at = (fast, {k: torch.zeros_like(v) for k, v in fast.items()})
                fast, velocity = at
                for data in parts[first : first + 2]:
                    leaf = {k: v.detach().requires_grad_() for k, v in fast.items()}
                    found = torch.autograd.grad(loops.inner(leaf, slow, data), list(leaf.values()))
                    velocity = {
                        k: loops.MOMENTUM * velocity[k] + g
                        for k, g in zip(leaf, found, strict=True)
                    }
                    fast = {k: v.detach() - loops.rate(slow) * velocity[k] for k, v in leaf.items()}
                particles[sign * pairs + i] = (fast, velocity)
                losses[sign, i] = upper(fast, slow, queries[first + 1])
        assert_close(aux.losses, losses, 1e-12)
        gains = (losses[0] - losses[1]) / (2 * sigma**2 * pairs)
        want = {k: torch.tensordot(gains, v, 1) for k, v in total.items()}
        assert_close(grads, want, 1e-9)  # a difference of losses that agree to two digits


def test_single_loop_algorithms_refuse_a_stream_by_name():
    algorithms = mf.algorithms
    episode = CASE.episode()
    for one in (
        algorithms.SOBA(PROBLEM, inner_lr=0.1, v_lr=0.1),
        algorithms.AmIGO(PROBLEM, inner_lr=0.1, v_lr=0.1),
        algorithms.StocBiO(PROBLEM, inner_lr=0.1, v_lr=0.1),
        algorithms.BOME(PROBLEM, inner_lr=0.1, fast_lr=0.1),
        algorithms.F2SA(PROBLEM, inner_lr=0.1, strength=10.0),
    ):
        state = one.init(CASE.outer, slices(episode.support)[0])
        with pytest.raises(mf.errors.ProblemError, match=r"stream.*one batch"):
            one.step(CASE.outer, state, episode)


# --- Batches.from_dataset ----------------------------------------------------------------------------


class Squares(torch.utils.data.Dataset):
    """A map-style data set of dicts."""

    def __len__(self):
        return 7

    def __getitem__(self, i):
        return {"x": torch.tensor(float(i)), "y": torch.tensor(float(i * i))}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rows_that_are_dicts_gain_their_index():
    stream = mf.Batches.from_dataset(Squares(), batch_size=3, steps=2, generator=seeded())
    for step in range(2):
        batch = stream.at(step)
        assert sorted(batch) == ["index", "x", "y"] and batch["index"].shape == (3,)
        assert torch.equal(batch["x"], batch["index"].float())
        assert torch.equal(batch["y"], batch["index"].float() ** 2)
    assert "index" not in Squares()[0]


ROWS = {
    "tensors": torch.arange(7.0),
    "pairs": torch.utils.data.TensorDataset(torch.arange(7.0), torch.arange(7.0) ** 2),
    "list": [float(i) for i in range(7)],
}


@pytest.mark.parametrize("kind", ROWS)
def test_other_rows_become_pairs_with_their_index(kind):
    stream = mf.Batches.from_dataset(ROWS[kind], batch_size=4, steps=3, generator=seeded())
    for step in range(3):
        index, row = stream.at(step)
        x = row[0] if kind == "pairs" else row
        assert torch.equal(index.double(), x.double())


@pytest.mark.parametrize(("size", "steps"), [(3, 2), (7, 1), (4, 7), (10, 5), (1, 14)])
def test_every_epoch_is_one_permutation(size, steps):
    stream = mf.Batches.from_dataset(Squares(), batch_size=size, steps=steps, generator=seeded())
    rows = torch.cat([stream.at(t)["index"] for t in range(steps)])
    assert len(rows) == size * steps
    for epoch in rows.split(7):
        assert len(set(epoch.tolist())) == len(epoch)
    assert rows[:7].tolist() != list(range(7))
    if size * steps >= 14:
        assert rows[:7].tolist() != rows[7:14].tolist()


def test_the_order_is_drawn_once_at_construction():
    generator = seeded()
    stream = mf.Batches.from_dataset(Squares(), batch_size=3, steps=4, generator=generator)
    before = generator.get_state()
    first = [stream.at(t)["index"].tolist() for t in range(4)]
    assert torch.equal(generator.get_state(), before)
    torch.manual_seed(5)
    assert [stream.at(t)["index"].tolist() for t in reversed(range(4))][::-1] == first
    again = mf.Batches.from_dataset(Squares(), batch_size=3, steps=4, generator=seeded())
    assert [again.at(t)["index"].tolist() for t in range(4)] == first
    other = mf.Batches.from_dataset(Squares(), batch_size=3, steps=4, generator=seeded(1))
    assert [other.at(t)["index"].tolist() for t in range(4)] != first
    # The generator goes on: a second stream of it is another one.
    second = mf.Batches.from_dataset(Squares(), batch_size=3, steps=4, generator=generator)
    assert [second.at(t)["index"].tolist() for t in range(4)] != first


def test_own_collate():
    stream = mf.Batches.from_dataset(
        [[1, 2], [3], [4, 5, 6]],
        batch_size=2,
        steps=1,
        generator=seeded(),
        collate=lambda rows: [len(row) + 10 * index for index, row in rows],
    )
    assert set(stream.at(0)) <= {2, 11, 23}


def test_from_dataset_refuses_what_it_cannot_draw_from():
    good = {"batch_size": 2, "steps": 2, "generator": seeded()}
    loader = torch.utils.data.DataLoader(Squares())
    with pytest.raises(mf.errors.ProblemError, match="map-style.*DataLoader"):
        mf.Batches.from_dataset(loader, **good)
    with pytest.raises(mf.errors.ProblemError, match="map-style"):
        mf.Batches.from_dataset(iter([1, 2]), **good)
    with pytest.raises(mf.errors.ProblemError, match="dataset is empty"):
        mf.Batches.from_dataset([], **good)
    for name in ("batch_size", "steps"):
        for bad in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} must be an integer"):
                mf.Batches.from_dataset(Squares(), **{**good, name: bad})
    with pytest.raises(ValueError, match="generator must be a torch.Generator"):
        mf.Batches.from_dataset(Squares(), **{**good, "generator": None})


@pytest.mark.parametrize("name", [n for n, (_, last) in UNROLLED.items() if last is None])
def test_weights_of_samples_are_looked_up_by_their_index(name):
    """A training run of minibatches, two epochs long: the weight of each sample is learned."""
    g = torch.Generator().manual_seed(1)
    rows = [
        {
            "x": torch.randn(3, generator=g, dtype=torch.float64),
            "y": torch.randn((), generator=g, dtype=torch.float64),
        }
        for _ in range(loops.SAMPLES)
    ]
    stream = mf.Batches.from_dataset(rows, batch_size=5, steps=5, generator=seeded())

    def loss(fast, slow, batch):
        return loops.inner(fast, slow, (batch["x"], batch["y"], batch["index"]))

    meta = mf.bilevel(
        mf.Problem(loss, upper, start), solver=loops.solver(5), estimator=UNROLLED[name][0]
    )
    query = slices(CASE.episode().query)[0]
    got = mf.hypergrad(meta)(CASE.outer, mf.Episode(stream, query))[0]
    permutations = seeded()
    order = torch.cat([torch.randperm(loops.SAMPLES, generator=permutations) for _ in range(3)])
    batches = [
        (torch.stack([rows[i]["x"] for i in part]), torch.stack([rows[i]["y"] for i in part]), part)
        for part in order[:25].split(5)
    ]
    want = hypergradient(CASE.outer, lambda o: value(o, batches, query))
    assert_close(got, want, tolerance(name))


# --- single values -----------------------------------------------------------------------------------


def test_per_step_is_a_pytree_and_keeps_its_numbers():
    stream = mf.PerStep({"x": torch.arange(12).reshape(4, 3)})
    leaves, spec = torch.utils._pytree.tree_flatten(stream)
    assert len(leaves) == 1
    assert torch.utils._pytree.tree_unflatten(leaves, spec).at(1)["x"].tolist() == [3, 4, 5]
    part = stream.part(range(1, 3))
    assert part.tree["x"].shape == (2, 3) and part.at(2)["x"].tolist() == [6, 7, 8]
    for step in (0, 3):
        with pytest.raises(mf.errors.ProblemError, match=rf"PerStep has no data.*step {step}"):
            part.at(step)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_batches_checks_its_steps(steps):
    with pytest.raises(ValueError, match="steps must be an integer"):
        mf.Batches(lambda step: None, steps)


def test_batches_refuses_steps_that_it_does_not_hold():
    stream = mf.Batches(lambda step: step, 3)
    assert [stream.at(t) for t in range(3)] == [0, 1, 2]
    for step in (-1, 3):
        with pytest.raises(mf.errors.ProblemError, match=f"holds 3 steps.*step {step}"):
            stream.at(step)
