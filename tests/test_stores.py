"""Stores: one hypergradient to the last bit, with the states and steps that a plan predicts."""

from __future__ import annotations

import dataclasses
import functools
import math

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import PROBLEM, STREAMS, Single, by_hand, start, stream_of, upper
from problems import assert_close

import metafocus as mf
from metafocus.autodiff.stores.places import Device
from metafocus.autodiff.stores.plans import turns
from metafocus.torch_internals import is_batched

STEPS = 11
CASE = loops.case(tasks=2, steps=STEPS)


def stores_of(folder):
    disk = mf.stores.disk(folder)
    return {
        "device": mf.stores.device(),
        "cpu": mf.stores.cpu(),
        "disk": disk,
        "segments": mf.stores.segments(),
        "segments(4, cpu)": mf.stores.segments(4, on=mf.stores.cpu()),
        "segments(20)": mf.stores.segments(20),
        "schedule(1)": mf.stores.schedule(1),
        "schedule(3)": mf.stores.schedule(3),
        "schedule(4, disk)": mf.stores.schedule(4, on=disk),
        "schedule(99)": mf.stores.schedule(99),
        "tree(2)": mf.stores.tree(2),
        "tree(3, disk)": mf.stores.tree(3, on=disk),
    }


NAMES = tuple(stores_of("unused"))


@pytest.fixture
def store(request, tmp_path):
    return stores_of(tmp_path / "states")[request.param]


def every(names=NAMES):
    return pytest.mark.parametrize("store", names, indirect=True)


def derivatives(meta, episode, outer=CASE.outer, wanted=()):
    """The derivative by `outer` and by the tensors in `wanted`, by one backward pass."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in outer.items()}
    loss, _ = meta(leaves, episode)
    inputs = [*leaves.values(), *wanted]
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


SOLVERS = {
    "momentum": loops.solver(STEPS),
    "Adam": mf.Adam(loops.rate, STEPS),
    "AdamW": mf.AdamW(loops.rate, STEPS, weight_decay=0.1),
    "RMSprop": mf.RMSprop(0.01, STEPS),
    "Adagrad": mf.Adagrad(0.1, STEPS),
    "Muon": mf.Muon(0.02, STEPS),
    "clipped": mf.SGD(0.1, STEPS, clip=mf.clip_global(0.3)),
}


@pytest.mark.parametrize("name", SOLVERS)
@every()
def test_equal_to_the_last_bit_for_every_solver(store, name):
    problem = mf.Problem(loops.inner, upper, lambda slow, _: loops.start(slow, None))

    def by(estimator):
        meta = mf.bilevel(problem, solver=SOLVERS[name], estimator=estimator)
        return derivatives(meta, CASE.episode())

    got = by(mf.Unrolled(store=store))
    for a, b in zip(got, by(mf.Unrolled(store=mf.stores.device())), strict=True):
        assert torch.equal(a, b)
    # The same numbers as the graph, summed in another order; Adam and Muon divide by small ones.
    assert_close(got, by(mf.Unrolled()), 1e-11)


@pytest.mark.parametrize("last", [None, 5, 0])
@every()
def test_equal_to_the_loop_by_hand(store, last):
    episode = CASE.episode()
    x, y, index = (x.clone() for x in episode.support.tree)
    x.requires_grad_()
    y.requires_grad_()
    seen = mf.Episode(mf.PerStep((x, y, index)), episode.query)
    meta = loops_meta(mf.Unrolled(last=last, store=store))
    got = derivatives(meta, seen, wanted=(x, y))

    leaves = {k: v.clone().requires_grad_() for k, v in CASE.outer.items()}
    batches = [(x[t], y[t], index[t]) for t in range(STEPS)]
    value = loops.value(leaves, batches, loops.slices(episode.query)[-1], last)
    inputs = [*leaves.values(), x, y]
    want = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    assert_close(got, want, 1e-12)


def loops_meta(estimator, steps=STEPS, **options):
    return mf.bilevel(PROBLEM, solver=loops.solver(steps), estimator=estimator, **options)


@every(("cpu", "disk", "segments", "schedule(3)", "tree(2)"))
@pytest.mark.parametrize("kind", STREAMS)
def test_streams(store, kind):
    episode = CASE.episode()
    stream = mf.Episode(stream_of(kind, episode.support), episode.query)
    got = derivatives(loops_meta(mf.Unrolled(store=store)), stream)
    assert_close(got, derivatives(loops_meta(mf.Unrolled()), episode), 1e-12)


@every(("cpu", "disk", "segments", "schedule(3)", "tree(2)"))
@pytest.mark.parametrize("last", [None, 4])
def test_path(store, last):
    def by(estimator):
        return derivatives(loops_meta(estimator, path=loops.learned_path), CASE.episode())

    # loops.case draws one weight of the path for each step.
    want = by(mf.Unrolled(last=last))
    assert_close(by(mf.Unrolled(last=last, store=store)), want, 1e-12)


def noisy(fast, slow, data):
    x, y, index = data
    return loops.inner(fast, slow, (F.dropout(x, 0.4), y, index))


@every()
def test_dropout_is_drawn_again(store):
    def by(estimator):
        torch.manual_seed(3)
        problem = dataclasses.replace(PROBLEM, inner_loss=noisy)
        meta = mf.bilevel(problem, solver=loops.solver(STEPS), estimator=estimator)
        found = derivatives(meta, CASE.episode())
        return found, torch.rand(3)

    got, after = by(mf.Unrolled(store=store))
    want, _ = by(mf.Unrolled())
    assert_close(got, want, 1e-12)
    # The backward pass leaves the random state where the forward pass left it.
    torch.manual_seed(3)
    with torch.no_grad():
        mf.adapt(
            dataclasses.replace(PROBLEM, inner_loss=noisy),
            CASE.outer,
            CASE.episode().support,
            solver=loops.solver(STEPS),
        )
    assert torch.equal(after, torch.rand(3))


@every()
def test_two_backward_passes_through_one_graph(store):
    leaves = CASE.leaves()
    loss, _ = loops_meta(mf.Unrolled(store=store))(leaves, CASE.episode())
    loss.backward(retain_graph=True)
    first = {k: v.grad.clone() for k, v in leaves.items() if v.grad is not None}
    for v in leaves.values():
        v.grad = None
    loss.backward()
    for k, g in first.items():
        assert torch.equal(leaves[k].grad, g)


@every(("device", "disk", "segments", "schedule(3)", "tree(2)"))
def test_many_cotangents_in_one_backward_pass(store):
    """Rows of a Jacobian by `is_grads_batched` are the gradients of the single losses."""
    episode = CASE.episode()
    leaves = CASE.leaves()
    solution = mf.Unrolled(store=store)(
        loops.inner, loops.solver(STEPS), start(leaves, None), leaves, episode.support
    )
    x, _ = loops.slices(episode.query)[-1]
    values = loops.predict(solution.params, x)
    inputs = [leaves["weight"], leaves["log_lr"], leaves["w1"]]
    rows = torch.autograd.grad(
        values, inputs, torch.eye(len(values), dtype=x.dtype), True, is_grads_batched=True
    )
    for i, value in enumerate(values):
        one = torch.autograd.grad(value, inputs, retain_graph=True)
        assert_close([r[i] for r in rows], one, 1e-12)

    def along(cotangent):
        return torch.autograd.grad(values, inputs, cotangent, retain_graph=True)

    assert_close(torch.func.vmap(along)(torch.eye(len(values), dtype=x.dtype)), rows, 1e-12)


def test_kernels_without_a_rule_for_batches_see_one_cotangent_at_a_time():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, grad):
            assert not is_batched(grad)
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    def loss(fast, slow, data):
        x, y, index = data
        each = Square.apply(loops.predict(fast, x) - y)
        return (torch.sigmoid(slow["weight"][index]) * each).mean()

    def rows(loss):
        leaves, episode = CASE.leaves(), CASE.episode()
        fast = mf.Unrolled(store=mf.stores.schedule(3))(
            loss, loops.solver(STEPS), start(leaves, None), leaves, episode.support
        ).params["w2"]
        return torch.func.vmap(
            lambda c: torch.autograd.grad(fast, leaves["weight"], c, retain_graph=True)[0]
        )(torch.eye(2, dtype=fast.dtype))

    assert_close(rows(loss), rows(loops.inner), 1e-12)


# --- counts ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counted:
    """A solver that counts its steps; the step with a graph is one of them."""

    solver: mf.SGD
    calls: list

    @property
    def steps(self):
        return self.solver.steps

    def init(self, params):
        return self.solver.init(params)

    def update(self, params, grads, state, step, outer):
        self.calls.append(step)
        return self.solver.update(params, grads, state, step, outer)


@dataclasses.dataclass(frozen=True)
class Watched(Device):
    """A place that knows how many states lie on its shelf."""

    most: list = dataclasses.field(default_factory=lambda: [0])

    def open(self):
        shelf, most = super().open(), self.most

        class Shelf(type(shelf)):
            def put(self, key, tensors):
                super().put(key, tensors)
                most[0] = max(most[0], len(self.states))

        return Shelf()


PLANS = {
    "device": mf.stores.device,
    "segments": mf.stores.segments,
    "segments(4)": functools.partial(mf.stores.segments, 4),
    **{f"schedule({s})": functools.partial(mf.stores.schedule, s) for s in (1, 2, 3, 5, 12, 70)},
    **{f"tree({k})": functools.partial(mf.stores.tree, k) for k in (2, 3, 8)},
}


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 16, 60])
@pytest.mark.parametrize("name", PLANS)
def test_states_and_steps_are_those_that_the_plan_predicts(name, steps):
    store = PLANS[name]()
    watched = dataclasses.replace(store, place=Watched())
    counted = Counted(loops.solver(steps), [])
    case = loops.case(tasks=1, steps=steps)
    meta = mf.bilevel(PROBLEM, solver=counted, estimator=mf.Unrolled(store=watched))
    leaves = case.leaves()
    loss, _ = meta(leaves, case.episode())
    trial = len(counted.calls) - steps
    assert trial == 1, "the preflight takes one step"
    counted.calls.clear()
    loss.backward()
    cost = store.cost(steps)
    assert len(counted.calls) == cost.extra + steps
    # The first state are the inputs, which never lie on the shelf.
    assert watched.place.most[0] + 1 == cost.states


@functools.cache
def fewest(steps, slots, first):
    """By dynamic programming: steps taken again; the first pass over them is free if `first`."""
    if steps == 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(
        (0 if first else m) + fewest(steps - m, slots - 1, first) + fewest(m, slots, False)
        for m in range(1, steps)
    )


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7, 12])
def test_no_schedule_takes_fewer_steps(slots):
    for steps in (*range(1, 25), 60, 100):
        cost = mf.stores.schedule(slots).cost(steps)
        assert cost.extra == fewest(steps, slots, True)
        assert cost.states == min(slots, steps)


def test_cost_formulas():
    assert mf.stores.device().cost(500) == (0, 500)
    # Segments: one more pass, 2 sqrt(K) states.
    extra, states = mf.stores.segments().cost(400)
    assert extra < 400
    assert states <= 2 * 20
    # A tree: a pass for each level, (k - 1) log_k K states.
    for k in (2, 4, 10):
        extra, states = mf.stores.tree(k).cost(1000)
        levels = math.ceil(math.log(1000, k))
        assert extra <= 1000 * levels
        assert states <= (k - 1) * levels + 1
    # Every state that a plan goes on from is held.
    for name in PLANS:
        for turn in turns(PLANS[name]().plan_for(50), 50):
            assert turn.begin <= turn.step


def mlp(fast, slow, data):
    x, y = data
    hidden = torch.tanh(x @ fast["w1"])
    return (slow["weight"].sigmoid() * ((hidden @ fast["w2"]).squeeze(-1) - y) ** 2).mean()


@pytest.mark.slow
def test_three_thousand_steps_with_twelve_states():
    steps = 3000
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=g).double(), torch.randn(8, generator=g).double()
    outer = {
        "w1": 0.5 * torch.randn(3, 4, generator=g).double(),
        "w2": 0.5 * torch.randn(4, 1, generator=g).double(),
        "weight": torch.zeros(8).double(),
    }
    query = x.flip(0), y.flip(0) + 0.1
    problem = mf.Problem(mlp, mlp, lambda slow, _: {k: slow[k] for k in ("w1", "w2")})

    def by(estimator):
        meta = mf.bilevel(problem, solver=mf.SGD(0.02, steps, momentum=0.5), estimator=estimator)
        return derivatives(meta, mf.Episode((x, y), query), outer)

    watched = dataclasses.replace(mf.stores.schedule(12), place=Watched())
    got = by(mf.Unrolled(store=watched))
    assert watched.place.most[0] + 1 == 12
    full = by(mf.Unrolled(store=mf.stores.device()))
    assert all(map(torch.equal, got, full))
    # Not recursive either way; the graph of all steps sums in another order.
    assert_close(got, by(mf.Unrolled(recompute=True)), 1e-12)


# --- what is refused -------------------------------------------------------------------------


def test_second_derivatives_are_refused_by_name():
    leaves = CASE.leaves()
    loss, _ = loops_meta(mf.Unrolled(store=mf.stores.device()))(leaves, CASE.episode())
    inputs = [leaves["weight"]]
    (grad,) = torch.autograd.grad(loss, inputs, create_graph=True)
    want = torch.autograd.grad(
        loops_meta(mf.Unrolled())(leaves, CASE.episode())[0], inputs, create_graph=True
    )
    assert_close([grad], want, 1e-12)
    with pytest.raises(mf.errors.TransformError, match=r"Unrolled\(store=...\) has first deriv"):
        torch.autograd.grad(grad.sum(), inputs)


def test_transforms_are_refused_by_name():
    meta = loops_meta(mf.Unrolled(store=mf.stores.device()))
    episode = CASE.episode()
    tangents = {k: torch.ones_like(v) for k, v in CASE.outer.items()}
    ways = (
        lambda: torch.func.grad(lambda o: meta(o, episode)[0])(CASE.outer),
        lambda: torch.func.vmap(lambda e: meta(CASE.outer, e)[0])(CASE.episodes),
        lambda: mf.over_tasks(meta)(CASE.leaves(), CASE.episodes),
        lambda: torch.func.jvp(lambda o: meta(o, episode)[0], (CASE.outer,), (tangents,)),
    )
    for way in ways:
        with pytest.raises(mf.errors.TransformError, match=r"Unrolled\(store=...\) inside a trans"):
            way()


def test_a_loop_over_tasks_is_no_transform():
    def by(estimator):
        meta = mf.over_tasks(loops_meta(estimator), how="loop")
        return derivatives(meta, CASE.episodes)

    assert_close(by(mf.Unrolled(store=mf.stores.schedule(3))), by(mf.Unrolled()), 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hvp": mf.hvp_forward}, r"store=...\) rebuilds steps with hvp_reverse only, got .*ward"),
        ({"hvp": mf.hvp_finite()}, "hvp_reverse only"),
        ({"recompute": 3}, r"got recompute=3 beside it.*segments\(k\)"),
        ({"store": "disk"}, r"store must be one of mf.stores.*'disk'"),
    ],
)
def test_what_does_not_go_with_a_store(options, message):
    with pytest.raises(mf.errors.ProblemError, match=message):
        mf.Unrolled(**{"store": mf.stores.device(), **options})


def test_arguments_of_stores():
    for make in (mf.stores.schedule, mf.stores.segments):
        with pytest.raises(ValueError, match=">= 1, got 0"):
            make(0)
    with pytest.raises(ValueError, match="k must be an integer >= 2, got 1"):
        mf.stores.tree(1)
    with pytest.raises(mf.errors.ProblemError, match=r"on must be mf.stores.cpu\(\)"):
        mf.stores.schedule(3, on=mf.stores.segments(2))
    with pytest.raises(mf.errors.ProblemError, match="directory must be a path, got int"):
        mf.stores.disk(3)


def test_a_stream_that_is_not_pure_is_refused():
    parts = loops.slices(CASE.episode().support)
    calls = []

    def fetch(step):
        calls.append(step)
        x, y, index = parts[step]
        return x + len(calls), y, index

    episode = mf.Episode(mf.Batches(fetch, STEPS), CASE.episode().query)
    loss, _ = loops_meta(mf.Unrolled(store=mf.stores.schedule(3)))(CASE.leaves(), episode)
    with pytest.raises(mf.errors.ProblemError, match=r"at.step. must be pure"):
        loss.backward()


def test_nothing_is_kept_where_nothing_needs_a_derivative():
    watched = dataclasses.replace(mf.stores.device(), place=Watched())
    with torch.no_grad():
        loops_meta(mf.Unrolled(store=watched))(CASE.leaves(), CASE.episode())
    assert watched.place.most == [0]


def test_a_closed_over_parameter_is_refused():
    extra = torch.ones((), dtype=torch.float64, requires_grad=True)
    problem = dataclasses.replace(PROBLEM, inner_loss=lambda f, s, d: extra * loops.inner(f, s, d))
    meta = mf.bilevel(
        problem, solver=loops.solver(STEPS), estimator=mf.Unrolled(store=mf.stores.device())
    )
    with pytest.raises(mf.errors.ClosureError):
        meta(CASE.leaves(), CASE.episode())


def test_one_step():
    case = loops.case(tasks=1, steps=1)
    one = Single(PROBLEM, case.outer, case.episode())
    meta = loops_meta(mf.Unrolled(store=mf.stores.schedule(2)), steps=1)
    got = derivatives(meta, one.episode(), case.outer)
    leaves = case.leaves()
    fast = by_hand(start(leaves, None), leaves, loops.slices(case.episode().support))[-1]
    value = upper(fast, leaves, loops.slices(case.episode().query)[-1])
    want = torch.autograd.grad(
        value, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    assert_close(got, want, 1e-12)


# --- recompute="auto" ------------------------------------------------------------------------


def wide_step(hidden):
    """A loss whose graph is large beside its parameters, or small, by the number of rows."""

    def loss(fast, slow, x):
        return (torch.tanh(x @ fast["w"]) * slow["scale"]).square().mean()

    problem = mf.Problem(loss, loss, lambda slow, _: {"w": slow["w"]})
    outer = {"w": torch.ones(hidden, hidden).double() / hidden, "scale": torch.ones(()).double()}
    return problem, outer


@pytest.mark.parametrize("rows", [1, 4000])
def test_auto_chooses_segments_by_two_sizes(rows):
    from metafocus.estimators.segments import best_size

    problem, outer = wide_step(30)
    x = torch.ones(rows, 30).double()
    solver = mf.SGD(0.1, 64)
    start = {"w": outer["w"]}
    state = torch.get_rng_state()
    size = best_size(problem.inner_loss, solver, range(64), start, {}, outer, x)
    assert torch.equal(state, torch.get_rng_state())
    # One row: the state outweighs the graph of a step. Many rows: the graph does.
    assert (size == 1) if rows == 4000 else (size > 5)

    def by(estimator):
        meta = mf.bilevel(problem, solver=solver, estimator=estimator)
        return derivatives(meta, mf.Episode(x, x[:1]), outer)

    assert_close(by(mf.Unrolled(recompute="auto")), by(mf.Unrolled()), 1e-12)


def test_auto_inside_transforms_rebuilds_single_steps():
    def by(estimator):
        meta = loops_meta(estimator)
        return torch.func.grad(lambda o: meta(o, CASE.episode())[0])(CASE.outer)

    assert_close(by(mf.Unrolled(recompute="auto")), by(mf.Unrolled()), 1e-12)


def test_auto_is_the_only_word():
    assert "recompute=auto" in repr(mf.Unrolled(recompute="auto"))
    with pytest.raises(ValueError, match=r'True, False or "auto", got \'some\''):
        mf.Unrolled(recompute="some")
    with pytest.raises(mf.errors.ProblemError, match="got recompute='auto' beside it"):
        mf.Unrolled(recompute="auto", store=mf.stores.device())
