"""One compiled graph gives what the eager hypergradient gives, and refuses what it cannot."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import F64
from torch import nn
from torch.utils import _pytree as pytree

import metafocus as mf
from metafocus.closures import closures_of

pytestmark = pytest.mark.usefixtures("float64")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


OUTER = {"w": 0.5 * randn(2, 4), "b": randn(4, seed=1), "v": 0.5 * randn(4, 1, seed=2)}
DATA = (randn(3, 6, 2, seed=3), randn(3, 6, 1, seed=4))
EPISODES = mf.Episode(DATA, tuple(x.flip(1) for x in DATA))
EPISODE = mf.Episode(*pytree.tree_map(lambda x: x[0], tuple(EPISODES)))


def fit(fast, slow, batch):
    x, y = batch
    return ((torch.tanh(x @ fast["w"] + fast["b"]) @ fast["v"] - y) ** 2).mean()


def normed(fast, slow, batch):
    x, y = batch
    hidden = F.layer_norm(x @ fast["w"] + fast["b"], (4,))
    return ((F.silu(hidden) @ fast["v"] - y) ** 2).mean()


def start(slow, support):
    return dict(slow)


PROBLEM = mf.Problem(mf.proximal(fit, 1.0), fit, start)


def step(fast, slow, batch):
    grads = torch.func.grad(PROBLEM.inner_loss)(fast, slow, batch)
    return {k: v - 0.1 * grads[k] for k, v in fast.items()}


ESTIMATORS = {
    "first order": mf.FirstOrder(),
    "graph": mf.Unrolled(),
    "last": mf.Unrolled(last=1),
    "recompute": mf.Unrolled(recompute=True),
    "segments": mf.Unrolled(recompute=2),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "finite": mf.Unrolled(hvp=mf.hvp_finite()),
    "cg": mf.Implicit(mf.CG(2)),
    "gmres": mf.Implicit(mf.GMRES(2)),
    "neumann": mf.Implicit(mf.Neumann(2, 0.1)),
    "nystrom": mf.Implicit(mf.Nystrom(2, 1.0)),
    "dense": mf.Implicit(mf.Dense(1.0)),
    "identity": mf.Implicit(mf.Identity()),
    "implicit, forward": mf.Implicit(mf.CG(2), hvp=mf.hvp_forward),
    "fixed point": mf.FixedPoint(step, mf.Neumann(2, 1.0)),
    "penalty": mf.Penalty(10.0),
}


FIRST = (mf.FirstOrder(), mf.SGD(0.05, 1))


def gradient(estimator=None, solver=None, problem=PROBLEM, tasks=False):
    meta = mf.bilevel(
        problem, solver=solver or mf.SGD(0.05, 2), estimator=estimator or mf.Unrolled()
    )
    return mf.hypergrad(mf.over_tasks(meta) if tasks else meta)


def same(got, want, tolerance=1e-12):
    (got, spec), (want, other) = pytree.tree_flatten(got), pytree.tree_flatten(want)
    assert spec == other
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and not a.requires_grad
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_equals_eager(name):
    """The backend `eager` runs the traced graph as it is; what it computes is decided by then."""
    eager = gradient(ESTIMATORS[name], tasks=True)
    fast = mf.compiled(eager, backend="eager")
    for scale in (1.0, 1.5):
        outer = {k: scale * v for k, v in OUTER.items()}
        same(fast(outer, EPISODES), eager(outer, EPISODES))


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("name", ["recompute", "cg"])
def test_equals_eager_through_aot(name):
    """One episode, Adam, clipping, and a loss with operators that are swapped for composites."""
    solver = mf.Adam(0.05, 2, clip=mf.clip_global(1.0))
    problem = mf.Problem(mf.proximal(normed, 1.0), normed, start)
    eager = gradient(ESTIMATORS[name], solver, problem)
    same(mf.compiled(eager, backend="aot_eager")(OUTER, EPISODE), eager(OUTER, EPISODE))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inductor_is_right():
    eager = gradient(tasks=True)
    same(mf.compiled(eager)(OUTER, EPISODES), eager(OUTER, EPISODES))


class Counting:
    """A backend that counts how often it is asked."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph


def test_once_for_the_same_shapes():
    counting = Counting()
    eager = gradient(*FIRST)
    fast = mf.compiled(eager, backend=counting)
    for _ in range(3):
        fast(OUTER, EPISODE)
    assert len(counting.graphs) == 1
    short = pytree.tree_map(lambda x: x[:4], tuple(EPISODE))
    same(fast(OUTER, mf.Episode(*short)), eager(OUTER, mf.Episode(*short)))
    assert len(counting.graphs) == 2
    single = pytree.tree_map(lambda x: x.float(), (OUTER, EPISODE))
    same(fast(*single), eager(*single), 1e-6)
    across = pytree.tree_map(lambda x: x.mT.contiguous().mT if x.ndim > 1 else x, (OUTER, EPISODE))
    same(fast(*across), eager(*across))
    assert len(counting.graphs) == 4
    same(fast(OUTER, EPISODE), eager(OUTER, EPISODE))
    assert len(counting.graphs) == 4


def cut(points, queries=6, of=EPISODE):
    take = {0: points, 1: queries}
    return mf.Episode(*(tuple(x[: take[i]] for x in of[i]) for i in (0, 1)))


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("name", ["first order", "graph", "recompute", "cg"])
def test_one_graph_serves_many_shapes(name):
    """The second set of shapes is compiled with unknown sizes; further ones are not compiled."""
    counting = Counting()
    eager = gradient(ESTIMATORS[name])
    fast = mf.compiled(eager, backend=counting)
    for points, queries in ((6, 6), (4, 6), (3, 6)):
        episode = cut(points, queries)
        same(fast(OUTER, episode), eager(OUTER, episode))
    assert len(counting.graphs) == 2
    # Another size changes than before: it was a constant of that graph.
    same(fast(OUTER, cut(4, 5)), eager(OUTER, cut(4, 5)))
    assert len(counting.graphs) == 3


def test_tasks_of_other_lengths_share_a_graph():
    counting = Counting()
    eager = gradient(*FIRST, tasks=True)
    fast = mf.compiled(eager, backend=counting)
    for points in (6, 5, 4):
        short = mf.Episode(*(tuple(x[:, :points] for x in part) for part in EPISODES))
        short = pytree.tree_map(torch.Tensor.contiguous, short)
        same(fast(OUTER, short), eager(OUTER, short))
    assert len(counting.graphs) == 2


def test_a_size_that_the_code_must_know_is_compiled_for_each():
    def loss(fast, slow, batch):
        x, y = batch
        # A loop over rows: its length is a part of the graph.
        return sum(fit(fast, slow, (x[i : i + 1], y[i : i + 1])) for i in range(len(x))) / len(x)

    counting = Counting()
    eager = gradient(*FIRST, problem=mf.Problem(loss, loss, start))
    fast = mf.compiled(eager, backend=counting)
    for points in (4, 3, 2):
        same(fast(OUTER, cut(points)), eager(OUTER, cut(points)))
    assert len(counting.graphs) == 3


def test_each_shape_by_itself_if_wanted():
    counting = Counting()
    eager = gradient(*FIRST)
    fast = mf.compiled(eager, backend=counting, dynamic=False)
    for points in (6, 5, 4):
        same(fast(OUTER, cut(points)), eager(OUTER, cut(points)))
    assert len(counting.graphs) == 3


def test_many_graphs_are_warned_of_and_the_oldest_is_dropped(monkeypatch):
    monkeypatch.setattr("metafocus.traces.KEPT", 3)
    monkeypatch.setattr("metafocus.traces.MANY", 4)
    counting = Counting()
    eager = gradient(*FIRST)
    fast = mf.compiled(eager, backend=counting, dynamic=False)
    for points in (6, 5, 4):
        fast(OUTER, cut(points))
    # Used again: the next one to go is that of 5 points.
    fast(OUTER, cut(6))
    with pytest.warns(mf.errors.RecompiledWarning, match="4 graphs"):
        fast(OUTER, cut(3))
    fast(OUTER, cut(6))
    fast(OUTER, cut(4))
    assert len(counting.graphs) == 4
    fast(OUTER, cut(5))
    assert len(counting.graphs) == 5


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = 1.0
        self.shift = nn.Parameter(randn(1, seed=5))

    def forward(self, x):
        return self.factor * x * (2.0 if self.training else 1.0) + self.shift


RATE = 1.0


def test_follows_what_is_closed_over():
    """A number, a replaced tensor, a mode: compiled anew. Values written in place: seen."""
    global RATE
    module, settings, box = Scaled(), {"scale": 1.0}, [torch.ones((), dtype=F64)]

    def loss(fast, slow, batch):
        x, y = batch
        fit = settings["scale"] * module(torch.tanh(x @ fast["w"] + fast["b"])) @ fast["v"] - y
        return RATE * box[0] * (fit**2).mean()

    counting = Counting()
    eager = gradient(*FIRST, problem=mf.Problem(loss, loss, start))
    fast = mf.compiled(eager, backend=counting)

    def replace():
        box[0] = 2 * box[0]

    def written():
        with torch.no_grad():
            module.shift.add_(1.0)
            box[0].mul_(0.5)

    def rate():
        global RATE
        RATE = 3.0

    changes = {
        "nothing": (lambda: None, 1),
        "number": (lambda: settings.update(scale=2.0), 2),
        "tensor": (replace, 3),
        "mode": (module.eval, 4),
        "attribute": (lambda: setattr(module, "factor", 0.5), 5),
        "values": (written, 5),
        "global": (rate, 6),
    }
    try:
        for name, (change, count) in changes.items():
            change()
            same(fast(OUTER, EPISODE), eager(OUTER, EPISODE))
            assert len(counting.graphs) == count, name
    finally:
        RATE = 1.0


def test_what_changes_at_every_call_is_named():
    calls = [0]

    def loss(fast, slow, batch):
        return fit(fast, slow, batch)

    def outer_loss(fast, slow, batch):
        return fit(fast, slow, batch) * (1 + 0 * calls[0])

    eager = gradient(*FIRST, problem=mf.Problem(loss, outer_loss, start))
    fast = mf.compiled(eager, backend="eager")
    with pytest.raises(mf.errors.TransformError, match=r"outer_loss\.calls\[0\]"):
        for _ in range(20):
            calls[0] += 1
            fast(OUTER, EPISODE)


def test_captured_sees_through_objects_and_cycles():
    class Loss:
        def __init__(self):
            self.scale = 2.0
            self.me = self

        def __call__(self, x, factor=3.0):
            return RATE * self.scale * factor * x

    loss = Loss()
    before = closures_of(loss)
    assert closures_of(loss) == before
    loss.scale = 3.0
    assert [k for k in before if closures_of(loss)[k] != before[k]] == ["Loss.scale"]
    assert "RATE" in before and any("defaults" in k for k in before)
    nan = closures_of(lambda x: (float("nan"), loss))
    assert nan == nan


def test_empty_outer_is_refused():
    module = nn.Linear(2, 1)
    problem = mf.Problem(
        lambda fast, slow, x: module(x).mean() * fast["s"],
        lambda fast, slow, x: module(x).mean() * fast["s"],
        init=lambda slow, support: {"s": torch.ones(())},
    )
    with pytest.raises(mf.errors.ProblemError, match=r"outer=\{\} with compiled"):
        mf.compiled(gradient(problem=problem), backend="eager")({}, mf.Episode(*DATA))


def test_wrong_arguments_are_refused():
    meta = mf.bilevel(PROBLEM, solver=mf.SGD(0.05, 1), estimator=mf.Unrolled())
    with pytest.raises(mf.errors.ProblemError, match="not the meta loss"):
        mf.compiled(meta, backend="eager")(OUTER, EPISODE)
    with pytest.raises(mf.errors.ProblemError, match="got dict"):
        mf.compiled(OUTER)
    with pytest.raises(mf.errors.ProblemError, match="dict of tensors"):
        mf.compiled(gradient())([], EPISODE)
    odd = mf.Episode((*EPISODE.support, object()), EPISODE.query)
    with pytest.raises(mf.errors.ProblemError, match="tensors and constants, got object"):
        mf.compiled(gradient())(OUTER, odd)


def test_inside_transforms_is_refused():
    fast = mf.compiled(gradient(), backend="eager")
    with pytest.raises(mf.errors.TransformError, match="must be inside the graph"):
        torch.func.vmap(fast, in_dims=(None, 0))(OUTER, EPISODES)
    with pytest.raises(mf.errors.TransformError, match="must be inside the graph"):
        torch.func.grad(lambda o: fast(o, EPISODE)[1][0])(OUTER)


def test_result_carries_no_graph():
    outer = {k: v.clone().requires_grad_() for k, v in OUTER.items()}
    eager = gradient(*FIRST)
    grads, (loss, _) = mf.compiled(eager, backend="eager")(outer, EPISODE)
    assert not loss.requires_grad and not any(g.requires_grad for g in grads.values())
    same(grads, eager(OUTER, EPISODE)[0])


def of(loss):
    return mf.compiled(gradient(*FIRST, mf.Problem(loss, fit, start)), backend="eager")


@pytest.mark.parametrize(
    ("loss", "word"),
    [
        (lambda f, s, b: fit(f, s, b) * (2 if b[0].sum() > 0 else 1), "branch on a value"),
        (lambda f, s, b: fit(f, s, b) * f["w"].detach().norm().item(), "branch on a value"),
        (lambda f, s, b: fit(f, s, tuple(x[b[1][:, 0] > 0] for x in b)), "depends on values"),
        (lambda f, s, b: fit(f, s, b) + float(b[0].numpy().sum()), "numpy"),
        (lambda f, s, b: fit(f, s, (F.dropout(b[0], 0.5), b[1])), "draws random numbers"),
    ],
    ids=["branch", "item", "mask", "numpy", "dropout"],
)
def test_what_cannot_be_compiled(loss, word):
    with pytest.raises(mf.errors.TransformError, match=word):
        of(loss)(OUTER, EPISODE)


def test_wrong_problems_are_refused_as_eagerly():
    with pytest.raises(mf.errors.ProblemError, match="must return a scalar"):
        of(lambda f, s, b: f["w"] * s["w"] * f["b"].sum() * f["v"].sum())(OUTER, EPISODE)
    closed = {k: v.clone().requires_grad_() for k, v in OUTER.items()}
    problem = mf.Problem(lambda f, s, b: fit(f, s, b) + fit(closed, s, b), fit, start)
    with pytest.raises(mf.errors.ClosureError):
        mf.compiled(gradient(mf.Implicit(), problem=problem), backend="eager")(OUTER, EPISODE)


def test_nan_is_raised_at_first_and_in_aux_then():
    fast = mf.compiled(gradient(*FIRST), backend="eager")
    bad = mf.Episode((EPISODE.support[0] * torch.nan, EPISODE.support[1]), EPISODE.query)
    with pytest.raises(mf.errors.NonFiniteError):
        fast(OUTER, bad)
    fast(OUTER, EPISODE)
    _, (loss, aux) = fast(OUTER, bad)
    assert loss.isnan() and aux.inner_losses.isnan().all()


def test_a_backend_that_fails_is_named():
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    with pytest.raises(mf.errors.TransformError, match=r"failed.*no compiler.*aot_eager"):
        mf.compiled(gradient(), backend=broken)(OUTER, EPISODE)


def test_autocast_is_part_of_what_is_compiled():
    eager = gradient(mf.FirstOrder())
    fast = mf.compiled(eager, backend="eager")
    outer, episode = pytree.tree_map(lambda x: x.float(), (OUTER, EPISODE))
    plain = fast(outer, episode)
    with torch.autocast("cpu", torch.bfloat16):
        half = fast(outer, episode)
        same(half, eager(outer, episode), 1e-6)
    assert not torch.equal(half[1][0], plain[1][0])
    same(fast(outer, episode), plain, 0.0)
