"""Many episodes at once, and the generator of sinusoid tasks."""

from __future__ import annotations

import math

import pytest
import torch
from problems import FAST, assert_close, flat, grads_of, maml, regression, sinusoid_tasks

import metafocus as mf

pytestmark = pytest.mark.usefixtures("float64")

HOWS = {
    "vmap": {},
    "loop": {"how": "loop"},
    "chunks of 1": {"chunk_size": 1},
    "chunks of 2": {"chunk_size": 2},
    "chunks of 99": {"chunk_size": 99},
}


def meta_of(case, estimator=None, steps=3):
    return mf.bilevel(
        case.problem, solver=mf.SGD(0.05, steps), estimator=estimator or mf.Unrolled()
    )


@pytest.mark.parametrize("how", HOWS)
def test_the_mean_over_tasks_with_aux_stacked(how):
    case = maml(tasks=5)
    meta = meta_of(case)
    leaves = case.leaves()
    value, aux = mf.over_tasks(meta, **HOWS[how])(leaves, case.episodes)
    value.backward()
    each = [torch.no_grad()(meta)(case.outer, case.episode(i)) for i in range(5)]
    want = torch.stack([v for v, _ in each]).mean().detach()
    # Batched operations, another order of sums.
    assert_close(value.detach(), want, 1e-13)
    assert aux.inner_losses.shape == (5, 3)
    assert_close(aux.inner_losses, torch.stack([a.inner_losses for _, a in each]), 1e-12)
    for k in FAST:
        assert aux.params[k].shape == (5, *case.outer[k].shape)
        assert_close(aux.params[k][3], each[3][1].params[k], 1e-12)
        assert not aux.params[k].requires_grad
    reference = case.leaves()
    sum(meta(reference, case.episode(i))[0] for i in range(5)).backward()
    assert_close(grads_of(leaves), {k: v / 5 for k, v in grads_of(reference).items()}, 1e-12)


@pytest.mark.parametrize("how", HOWS)
def test_one_task(how):
    case = maml(tasks=1)
    meta = meta_of(case)
    value, aux = torch.no_grad()(mf.over_tasks(meta, **HOWS[how]))(case.outer, case.episodes)
    assert_close(
        value.detach(), torch.no_grad()(meta)(case.outer, case.episode(0))[0].detach(), 1e-13
    )
    assert aux.inner_losses.shape == (1, 3)


@pytest.mark.parametrize("how", ["vmap", "loop"])
def test_episodes_may_hold_what_is_no_tensor(how):
    def loss(fast, slow, data):
        assert data["name"] == "mse" and data["nothing"] is None
        return ((fast["w"] - data["x"]) ** data["power"]).mean()

    problem = mf.Problem(loss, loss, lambda slow, support: dict(slow))
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 2), estimator=mf.Unrolled(recompute=True))
    data = {"x": torch.randn(4, 3), "power": 2, "name": "mse", "nothing": None}
    outer = {"w": torch.zeros(3)}
    grads, _ = mf.hypergrad(mf.over_tasks(meta, how=how))(outer, (data, data))
    want, _ = mf.hypergrad(mf.over_tasks(meta, how="loop"))(outer, (data, data))
    assert_close(grads, want, 1e-13)


def test_nested_over_tasks():
    # Twice stacked: groups of tasks.
    case = maml(tasks=4)
    twice = torch.utils._pytree.tree_map(
        lambda x: x.reshape(2, 2, *x.shape[1:]), tuple(case.episodes)
    )
    meta = meta_of(case)
    nested = mf.over_tasks(mf.over_tasks(meta))
    got, (value, aux) = mf.hypergrad(nested)(case.outer, mf.Episode(*twice))
    want, (same, _) = mf.hypergrad(mf.over_tasks(meta))(case.outer, case.episodes)
    assert_close(got, want, 1e-12)
    assert_close(value, same, 1e-13)
    assert aux.inner_losses.shape == (2, 2, 3)


@pytest.mark.parametrize("how", ["vmap", "loop"])
def test_a_bad_task_is_named(how):
    case = maml(tasks=4)
    meta = mf.over_tasks(meta_of(case), how=how)
    torch.no_grad()(meta)(case.outer, case.episodes)
    (x, y), query = case.episodes
    y = y.clone()
    y[2] = float("nan")
    with pytest.raises(mf.errors.NonFiniteError, match=r"[Tt]ask 2.*step 0"):
        torch.no_grad()(meta)(case.outer, mf.Episode((x, y), query))


def test_inside_a_transform_a_bad_task_travels_in_aux():
    case = maml(tasks=3)
    (x, y), query = case.episodes
    y = y.clone()
    y[1] = float("inf")
    _, (_, aux) = torch.func.grad_and_value(mf.over_tasks(meta_of(case)), has_aux=True)(
        case.outer, mf.Episode((x, y), query)
    )
    assert aux.inner_losses.isfinite().all(1).tolist() == [True, False, True]


SIZES = {
    "unequal": ({"x": torch.ones(3, 2), "y": torch.ones(4, 2)}, r"axis-0 sizes \[3, 4, 3\]"),
    "scalar": ({"x": torch.ones(3, 2), "y": torch.ones(())}, r"axis-0 sizes \[3, None, 3\]"),
    "none": ({"x": torch.ones(0, 2), "y": torch.ones(0, 2)}, r"axis-0 sizes \[0, 0, 3\]"),
}


@pytest.mark.parametrize("how", ["vmap", "loop"])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_do_not_fit(name, how):
    support, message = SIZES[name]
    meta = mf.over_tasks(meta_of(maml()), how=how)
    with pytest.raises(
        mf.errors.ProblemError, match=rf"stacked on axis 0.*{message}.*mf\.stack_episodes"
    ):
        meta({}, mf.Episode(support, torch.ones(3)))
    with pytest.raises(mf.errors.ProblemError, match=r"got axis-0 sizes \[\]"):
        meta({}, mf.Episode(1, None))


def test_arguments_out_of_range():
    meta = meta_of(maml())
    for how in ("map", None, "Vmap"):
        with pytest.raises(ValueError, match=f"how must be 'vmap' or 'loop', got {how!r}"):
            mf.over_tasks(meta, how=how)
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"chunk_size must be an integer >= 1.*got {size}"):
            mf.over_tasks(meta, chunk_size=size)


def _dropped(fast, slow, data):
    return (torch.nn.functional.dropout(fast["w"] * data, 0.5) ** 2).sum()


RANDOM = mf.Problem(_dropped, lambda f, s, x: (f["w"] * x).sum(), lambda slow, support: dict(slow))


@pytest.mark.parametrize("estimator", [mf.Unrolled(), mf.Unrolled(recompute=True)], ids=str)
def test_randomness(estimator):
    outer, data = {"w": torch.ones(30, requires_grad=True)}, torch.ones(3, 30)
    meta = mf.bilevel(RANDOM, solver=mf.SGD(0.1, 2), estimator=estimator)
    with pytest.raises(mf.errors.TransformError, match="draws random numbers, as dropout"):
        mf.over_tasks(meta)(outer, (data, data))
    for randomness, count in (("same", 1), ("different", 3)):
        torch.manual_seed(0)
        _, aux = mf.over_tasks(meta, randomness=randomness)(outer, (data, data))
        rows = {tuple(row.tolist()) for row in aux.params["w"]}
        assert len(rows) == count


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("name", ["recompute", "forward"])
def test_random_losses_under_vmap_are_replayed(randomness, name):
    other = {"recompute": mf.Unrolled(recompute=True), "forward": mf.Unrolled(hvp=mf.hvp_forward)}
    outer, data = {"w": torch.linspace(0.5, 1, 30)}, torch.linspace(0.5, 2, 90).reshape(3, 30)
    got = []
    for estimator in (mf.Unrolled(), other[name]):
        meta = mf.over_tasks(
            mf.bilevel(RANDOM, solver=mf.SGD(0.1, 2), estimator=estimator), randomness=randomness
        )
        with torch.no_grad():
            meta(outer, (data, data))
        torch.manual_seed(3)
        leaf = {"w": outer["w"].clone().requires_grad_()}
        meta(leaf, (data, data))[0].backward()
        got.append(leaf["w"].grad)
    # The masks are those of the forward pass.
    assert_close(got[1], got[0], 1e-12)


# --- sinusoids -----------------------------------------


def test_sinusoid_tasks_are_sinusoids_in_their_ranges():
    tasks = 2000
    (x, y), (xq, yq) = sinusoid_tasks(tasks, 10, 15, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (tasks, 10, 1) and xq.shape == yq.shape == (tasks, 15, 1)
    for v in (x, xq):
        assert v.min() >= -5 and v.max() <= 5
        # The ends of a uniform law are nearly reached.
        assert v.min() < -4.9 and v.max() > 4.9
    # y = a sin(x - p) = (a cos p) sin x - (a sin p) cos x: two numbers explain all 25 points.
    both_x, both_y = torch.cat([x, xq], 1), torch.cat([y, yq], 1)
    basis = torch.cat([both_x.sin(), -both_x.cos()], 2)
    fit = torch.linalg.lstsq(basis, both_y).solution
    # Least squares in float64.
    assert (basis @ fit - both_y).abs().max() < 1e-10
    amplitude = fit.squeeze(2).norm(dim=1)
    phase = torch.atan2(fit[:, 1, 0], fit[:, 0, 0])
    assert amplitude.min() >= 0.1 - 1e-9 and amplitude.max() <= 5 + 1e-9
    assert phase.min() >= -1e-6 and phase.max() <= math.pi + 1e-6
    # Means of 2000 uniform numbers: five standard errors.
    assert abs(amplitude.mean() - 2.55) < 5 * 4.9 / math.sqrt(12 * tasks)
    assert abs(phase.mean() - math.pi / 2) < 5 * math.pi / math.sqrt(12 * tasks)
    assert abs(torch.corrcoef(torch.stack([amplitude, phase]))[0, 1]) < 5 / math.sqrt(tasks)


def test_sinusoid_tasks_repeat_with_their_generator():
    a, b = (sinusoid_tasks(3, 4, 5, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(flat(list(a)), flat(list(b)))
    c = sinusoid_tasks(3, 4, 5, torch.Generator().manual_seed(8))
    assert not torch.equal(flat(list(a)), flat(list(c)))


def test_maml_learns_sinusoids():
    # 150 outer steps of second-order MAML beat the start by far: the whole engine descends.
    g = torch.Generator().manual_seed(0)
    outer = {
        "0.weight": torch.randn(20, 1, generator=g).double().requires_grad_(),
        "0.bias": torch.randn(20, generator=g).double().requires_grad_(),
        "2.weight": (torch.randn(1, 20, generator=g).double() / 4).requires_grad_(),
        "2.bias": torch.zeros(1).requires_grad_(),
    }
    problem = mf.Problem(regression, regression, lambda slow, support: dict(slow))
    meta = mf.over_tasks(
        mf.bilevel(problem, solver=mf.SGD(0.01, 3), estimator=mf.Unrolled(recompute=True))
    )
    optimizer = torch.optim.Adam(outer.values(), lr=0.02)
    held_out = sinusoid_tasks(50, 10, 10, g)
    with torch.no_grad():
        before, _ = meta(outer, held_out)
    for _ in range(150):
        optimizer.zero_grad()
        meta(outer, sinusoid_tasks(10, 10, 10, g))[0].backward()
        optimizer.step()
    with torch.no_grad():
        after, _ = meta(outer, held_out)
    # Sinusoids vary; a fifth off the held-out loss is far outside what no learning does.
    assert after < 0.8 * before


@pytest.mark.parametrize("order", ["first", "second", "recomputed"])
@pytest.mark.parametrize("steps", [1, 5])
def test_vmap_over_25_sinusoids_equals_the_loop(order, steps):
    """The classic network, 1-40-40-1 with ReLU; values, hypergradients and fast weights."""
    estimator = {
        "first": mf.FirstOrder(),
        "second": mf.Unrolled(),
        "recomputed": mf.Unrolled(recompute=True),
    }[order]
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 40),
        torch.nn.ReLU(),
        torch.nn.Linear(40, 40),
        torch.nn.ReLU(),
        torch.nn.Linear(40, 1),
    )

    def loss(fast, slow, data):
        x, y = data
        return ((torch.func.functional_call(net, fast, (x,)) - y) ** 2).mean()

    problem = mf.Problem(loss, loss)
    meta = mf.bilevel(problem, solver=mf.SGD(0.01, steps), estimator=estimator)
    outer = {k: v.detach() for k, v in net.named_parameters()}
    episodes = sinusoid_tasks(25, 10, 10, torch.Generator().manual_seed(0))
    got, (value, aux) = mf.hypergrad(mf.over_tasks(meta))(outer, episodes)
    want, (expected, aux_loop) = mf.hypergrad(mf.over_tasks(meta, how="loop"))(outer, episodes)
    # The same operations in float64; sums over 25 tasks in another order.
    assert_close(value, expected, 1e-12)
    assert_close(flat(got), flat(want), 1e-12)
    assert_close(flat(aux.params), flat(aux_loop.params), 1e-12)
