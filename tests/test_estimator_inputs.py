"""What estimators are given: supports that need a derivative, own parts, randomness, odd sizes."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import (
    FAST,
    SOLVERS,
    Quadratic,
    Recipe,
    assert_close,
    flat,
    grads_of,
    maml,
    naive_meta,
    pulled,
    regression,
    relative_error,
)
from ways import (
    HVPS,
    SECOND,
    STEPS,
    UNROLLED,
    WAYS,
    expected,
    tape_grad,
    tolerance,
)

import metafocus as mf

pytestmark = pytest.mark.usefixtures("float64")


# --- the support and prepare ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["graph", "last=2", "recompute", "recompute=2", "forward", "finite"]
)
@pytest.mark.parametrize("way", ["backward", "func.grad"])
def test_gradients_reach_the_support(name, way):
    # Data-set distillation: the support is what is learned.
    case = maml()
    estimator = SECOND[name]
    last = estimator.last
    episode = case.episode(0)
    x = episode.support[0]
    solver = SOLVERS["plain"]
    leaf = x.clone().requires_grad_()
    naive_meta(
        pulled,
        regression,
        case.problem.init,
        case.leaves(),
        mf.Episode((leaf, episode.support[1]), episode.query),
        solver,
        STEPS,
        None,
    ).backward()
    want = leaf.grad
    meta = mf.bilevel(case.problem, solver=solver.solver(STEPS), estimator=estimator)

    def loss(v):
        return meta(case.outer, mf.Episode((v, episode.support[1]), episode.query))[0]

    got = torch.func.grad(loss)(x) if way == "func.grad" else tape_grad(loss)(x)
    if last is not None:
        # Truncation leaves a part of it only.
        assert 0 < relative_error(got, want) < 1
    else:
        assert_close(got, want, tolerance(name))


@pytest.mark.parametrize("name", SECOND)
def test_prepare_runs_once_and_is_differentiated_like_the_loss(name):
    calls = []

    def prepare(slow, episode):
        calls.append(1)
        return mf.Episode(slow["scale"] * episode.support, slow["scale"] * episode.query)

    def inner(fast, slow, x):
        return ((fast["w"] - x) ** 2).sum() + (fast["w"] ** 4).sum()

    def inner_unprepared(fast, slow, x):
        return inner(fast, slow, slow["scale"] * x)

    def outer_loss(fast, slow, x):
        return (fast["w"] * x).sum()

    def outer_unprepared(fast, slow, x):
        return outer_loss(fast, slow, slow["scale"] * x)

    def init(slow, support):
        return {"w": torch.zeros(2)}

    outer = {"scale": torch.tensor([0.7, 1.3])}
    episode = mf.Episode(torch.tensor([0.4, -0.3]), torch.tensor([1.0, 2.0]))
    implicit = name.startswith("Implicit")
    solver = mf.SGD(0.1, 80 if implicit else 3)
    estimator = SECOND[name]
    got, _ = mf.hypergrad(
        mf.bilevel(mf.Problem(inner, outer_loss, init, prepare), solver=solver, estimator=estimator)
    )(outer, episode)
    assert len(calls) == 1
    want, _ = mf.hypergrad(
        mf.bilevel(
            mf.Problem(inner_unprepared, outer_unprepared, init),
            solver=solver,
            estimator=estimator,
        )
    )(outer, episode)
    # The chain rule through one more node; finite differences carry 1e-10 of noise.
    assert_close(got, want, 1e-8 if name == "finite" else 1e-13)


# --- own parts ------------------------------------------------------------------------------------


class Reversed(mf.SGD):
    """A solver that returns its dict in another order."""

    def update(self, params, grads, state, step, outer):
        new, state = super().update(params, grads, state, step, outer)
        return {k: new[k] for k in reversed(list(new))}, state


@pytest.mark.parametrize("name", [k for k in SECOND if k != "finite"])
def test_the_order_of_a_solvers_dict_does_not_matter(name):
    def inner(fast, slow, x):
        return (fast["a"] - slow["p"][0]) ** 2 + 2 * (fast["b"] - slow["p"][1]) ** 2

    def outer_loss(fast, slow, x):
        return fast["a"] + 10 * fast["b"]

    problem = mf.Problem(
        inner, outer_loss, lambda _, support: {"a": torch.zeros(()), "b": torch.zeros(())}
    )
    outer = {"p": torch.tensor([1.0, 2.0])}
    episode = (torch.zeros(1), torch.zeros(1))
    steps = 51 if name.startswith("Implicit") else 3
    results = [
        mf.hypergrad(mf.bilevel(problem, solver=s, estimator=SECOND[name]))(outer, episode)
        for s in (mf.SGD(0.2, steps), Reversed(0.2, steps))
    ]
    (want, (loss, _)), (got, (same, aux)) = results
    # The same operations in another order.
    assert_close(same, loss, 1e-14)
    assert_close(got, want, 1e-14)
    assert aux.params["a"] != aux.params["b"]


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
def test_the_order_of_a_linear_solvers_dict_does_not_matter():
    quadratic = Quadratic()
    case = quadratic.case()

    def backwards(matvec, b):
        x = mf.CG(5)(matvec, b)
        return {k: x[k] for k in reversed(list(x))}

    for way in ("backward", "func.grad", "vmap(grad)"):
        got, want = (
            WAYS[way](
                mf.bilevel(
                    case.problem, solver=mf.SGD(quadratic.lr, 2), estimator=mf.Implicit(solve)
                ),
                case,
            )
            for solve in (backwards, mf.CG(5))
        )
        # The same operations.
        assert_close(got, want, 1e-14)


def test_an_own_estimator_is_a_function():
    def frozen(inner_loss, solver, start, outer, support):
        return mf.Solution(start, torch.zeros(0))

    case = maml()
    meta = mf.bilevel(case.problem, solver=mf.SGD(0.1, 5), estimator=frozen)
    got, _ = mf.hypergrad(meta)(case.outer, case.episode(0))
    want = torch.func.grad(lambda o: regression({k: o[k] for k in FAST}, o, case.episode(0).query))(
        case.outer
    )
    # The same operations.
    assert_close(got, want, 1e-15)


class SignDescent:
    """Three lines of one's own, with a step counter as integer state."""

    steps = STEPS

    def init(self, params):
        return torch.zeros((), dtype=torch.int64)

    def update(self, params, grads, state, step, outer):
        rate = 0.05 / (1 + state)
        return {k: p - rate * torch.tanh(grads[k]) for k, p in params.items()}, state + 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["graph", "recompute", "recompute=2", "forward"])
def test_an_own_solver_may_carry_integers(name, way):
    case = maml()
    found = []
    for i in range(case.tasks):
        leaves = case.leaves()
        fast = {k: leaves[k] for k in FAST}
        for t in range(STEPS):
            loss = pulled(fast, leaves, case.episode(i).support)
            g = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {
                k: p - 0.05 / (1 + t) * torch.tanh(d)
                for (k, p), d in zip(fast.items(), g, strict=True)
            }
        regression(fast, None, case.episode(i).query).backward()
        found.append(grads_of(leaves))
    meta = mf.bilevel(case.problem, solver=SignDescent(), estimator=SECOND[name])
    # Order of sums only.
    assert_close(WAYS[way](meta, case), expected(found, way), 1e-11)


# --- randomness and autocast ----------------------------------------------------------------------


def _dropped(fast, slow, x):
    h = torch.nn.functional.dropout(torch.tanh(fast["w"] * x), 0.5)
    return ((h - 0.3) ** 2).sum() + (torch.nn.functional.dropout(fast["w"], 0.3) ** 4).sum()


RANDOM = {
    "recompute": mf.Unrolled(recompute=True),
    "recompute=2": mf.Unrolled(recompute=2),
    "recompute=3": mf.Unrolled(recompute=3),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "finite": mf.Unrolled(hvp=mf.hvp_finite()),
}


@pytest.mark.parametrize("transform", ["backward", "func.grad"])
@pytest.mark.parametrize("name", RANDOM)
def test_dropout_in_the_inner_loss_is_replayed(name, transform):
    problem = mf.Problem(
        _dropped,
        lambda fast, slow, x: (fast["w"] * x).sum(),
        lambda slow, support: {"w": slow["w"]},
    )
    outer = {"w": torch.linspace(-1, 1, 9)}
    episode = mf.Episode(torch.linspace(0.5, 2, 9), torch.ones(9))

    def run(estimator):
        meta = mf.bilevel(problem, solver=mf.SGD(0.1, 4, momentum=0.5), estimator=estimator)
        with torch.no_grad():
            meta(outer, episode)  # the first call, with its trial
        torch.manual_seed(7)
        if transform == "backward":
            leaf = {"w": outer["w"].clone().requires_grad_()}
            meta(leaf, episode)[0].backward()
            found = leaf["w"].grad
        else:
            found = torch.func.grad(lambda o: meta(o, episode)[0])(outer)["w"]
        return found, torch.get_rng_state()

    want, state = run(mf.Unrolled())
    got, same = run(RANDOM[name])
    # The masks must be those of the forward pass; then only the usual differences remain.
    assert_close(got, want, 1e-7 if name == "finite" else 1e-12)
    assert torch.equal(state, same)


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("hvp", HVPS)
def test_implicit_uses_one_random_draw_for_all_its_products(hvp):
    problem = mf.Problem(
        lambda fast, slow, x: (
            torch.nn.functional.dropout((fast["w"] - slow["w"]) ** 2, 0.5).sum()
            + (fast["w"] ** 2).sum()
        ),
        lambda fast, slow, x: (fast["w"] * x).sum(),
        lambda slow, support: {"w": torch.zeros(6)},
    )
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 3), estimator=mf.Implicit(mf.CG(6), HVPS[hvp]))
    leaf = {"w": torch.linspace(1, 2, 6).requires_grad_()}
    loss, _ = meta(leaf, (torch.zeros(1), torch.ones(6)))
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(before, torch.get_rng_state())
    # An entry is either dropped, H = 2 and M = 0, or doubled, H = 6 and M = -4: 0 or 2/3. Two
    # draws would mix these: -4 / 2 or 0.
    values = leaf["w"].grad
    # Central differences of a quadratic: rounding only.
    assert all(min(abs(v), abs(v - 2 / 3)) < 1e-8 for v in values.tolist())
    assert values.any()


@pytest.mark.parametrize(
    ("recompute", "again"), [(False, 0), (True, 7), (2, 5), (3, 4), (6, 1), (7, 0), (9, 0)]
)
def test_segments_run_again_but_for_a_whole_last_one(recompute, again):
    calls = []

    def inner(fast, slow, x):
        calls.append(1)
        return ((fast["w"] * slow["c"] - x) ** 2).sum()

    problem = mf.Problem(inner, inner, lambda slow, support: {"w": slow["c"]})
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 7), estimator=mf.Unrolled(recompute=recompute))
    leaf = {"c": torch.ones(2, requires_grad=True)}
    meta(leaf, (torch.zeros(2), torch.zeros(2)))[0].backward()  # the first call, with its trial
    calls.clear()
    meta(leaf, (torch.zeros(2), torch.zeros(2)))[0].backward()
    # Seven steps, the outer loss, and what is rebuilt: the rest of 7 steps is the first segment.
    assert len(calls) == 7 + 1 + again


@pytest.mark.parametrize("name", ["recompute", "recompute=2"])
def test_autocast_gives_the_same_hypergradient_as_the_graph(name):
    torch.manual_seed(0)
    weights = {"w": torch.randn(8, 8, dtype=torch.float32) / 3}
    x = torch.randn(16, 8, dtype=torch.float32)

    def loss(fast, slow, data):
        return ((torch.tanh(data @ fast["w"]) @ slow["w"]).float() ** 2).mean()

    problem = mf.Problem(loss, loss, lambda slow, support: dict(slow))

    def run(estimator):
        leaf = {k: v.clone().requires_grad_() for k, v in weights.items()}
        meta = mf.bilevel(problem, solver=mf.SGD(0.5, 3), estimator=estimator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, _ = meta(leaf, (x, x))
            # A later forward pass of the same step that reads the same weight.
            total = total + loss(leaf, leaf, x)
        total.backward()
        return leaf["w"].grad

    # Both round to bfloat16 at the same places, but the cast cache sums two uses of one cast in
    # bfloat16 where recomputation sums them in float32: one unit of 2^-8.
    assert_close(run(RANDOM[name]), run(mf.Unrolled()), 2**-8)


# --- degenerate and odd sizes ---------------------------------------------------------------------

ALL = {**{k: v[0] for k, v in UNROLLED.items()}, "Implicit": mf.Implicit()}


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("way", ["backward", "func.grad", "vmap(grad)", "backward(loop)"])
@pytest.mark.parametrize("name", ALL)
def test_zero_steps_mean_no_adaptation(name, way):
    case = maml()
    meta = mf.bilevel(case.problem, solver=mf.SGD(0.1, 0), estimator=ALL[name])
    got = WAYS[way](meta, case)
    with torch.no_grad():
        value, aux = meta(case.outer, case.episode(0))
    assert torch.equal(value, regression(case.outer, None, case.episode(0).query))
    assert aux.inner_losses.shape == (0,)
    found = [
        torch.func.grad(lambda o, i=i: regression(o, None, case.episode(i).query))(case.outer)
        for i in range(case.tasks)
    ]
    if name == "Implicit":
        # The theorem is applied at the start: another number, but a number.
        assert flat(got).isfinite().all()
    else:
        # The same operations.
        assert_close(got, expected(found, way), 1e-14)


@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("way", ["backward", "func.grad", "vmap(grad)", "backward(loop)"])
@pytest.mark.parametrize("name", ALL)
def test_empty_fast_weights_mean_no_adaptation(name, way, pull):
    case = maml()

    def inner(fast, slow, data):
        return slow["log_lr"] * data[0].mean()

    problem = mf.Problem(
        mf.proximal(inner, 1.0) if pull else inner,
        lambda fast, slow, data: regression(slow, slow, data),
        lambda slow, support: {},
    )
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 3), estimator=ALL[name])
    found = [
        torch.func.grad(lambda o, i=i: regression(o, None, case.episode(i).query))(case.outer)
        for i in range(case.tasks)
    ]
    # The same operations.
    assert_close(WAYS[way](meta, case), expected(found, way), 1e-14)
    with torch.no_grad():
        _value, aux = meta(case.outer, case.episode(0))
    assert aux.params == {}
    assert aux.inner_losses.shape == (0,)


@pytest.mark.parametrize("name", ["graph", "recompute", "Implicit"])
def test_a_meta_loss_inside_a_meta_loss(name):
    # Three levels: the inner loss is itself a meta loss, so everything is derived once more.
    def low(fast, slow, x):
        return ((fast["u"] - slow["w"] * x) ** 2).sum() + 0.1 * (fast["u"] ** 4).sum()

    problem = mf.Problem(
        low,
        lambda fast, slow, x: ((fast["u"] - 1) ** 2).sum(),
        lambda _, support: {"u": torch.zeros(2)},
    )
    x = torch.tensor([0.5, 0.8])
    long = name == "Implicit"

    def top(estimator):
        nested = mf.bilevel(problem, solver=mf.SGD(0.2, 60 if long else 2), estimator=estimator)

        def inner(fast, slow, data):
            return nested({"w": fast["w"]}, (data, data))[0] + 0.05 * (fast["w"] ** 2).sum()

        upper = mf.Problem(
            inner, lambda f, s, d: (f["w"] ** 2).sum(), lambda slow, support: dict(slow)
        )
        return mf.bilevel(upper, solver=mf.SGD(0.3, 2), estimator=mf.Unrolled())

    outer = {"w": torch.tensor([0.3, 1.4])}
    want, _ = mf.hypergrad(top(mf.Unrolled()))(outer, (x, x))
    got, _ = mf.hypergrad(top(ALL[name]))(outer, (x, x))
    # Exact for the unrolled; the implicit one has converged to 0.6^60 = 5e-14 and better.
    assert_close(got, want, 1e-9)


def test_float32_and_mixed_shapes_keep_their_dtype():
    def loss(fast, slow, x):
        return (fast["s"] - x.mean()) ** 2 + (fast["m"] ** 2).sum()

    problem = mf.Problem(loss, loss, lambda slow, support: dict(slow))
    outer = {
        "s": torch.tensor(1.0, dtype=torch.float32),
        "m": torch.ones(2, 0, 3, dtype=torch.float32),
    }
    episode = (torch.ones(2, dtype=torch.float32), torch.zeros(2, dtype=torch.float32))
    for name, estimator in ALL.items():
        for solver in (mf.SGD(0.3, 4, momentum=0.1), mf.Adam(0.3, 4)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", mf.errors.NotStationaryWarning)
                grads, (value, aux) = mf.hypergrad(
                    mf.bilevel(problem, solver=solver, estimator=estimator)
                )(outer, episode)
            for x in (*grads.values(), value, *aux.params.values(), aux.inner_losses):
                assert x.dtype == torch.float32, name
            assert grads["m"].shape == (2, 0, 3)


def test_constructors_refuse_what_they_cannot_mean():
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match=rf"last must be an integer >= 0, got {bad!r}"):
            mf.Unrolled(last=bad)
    for bad in (-1, 1.5):
        with pytest.raises(ValueError, match=rf"recompute must be .*got {bad!r}"):
            mf.Unrolled(recompute=bad)
    assert repr(mf.Unrolled(hvp=mf.hvp_finite(0.01))) == (
        "Unrolled(last=None, recompute=False, hvp=_Finite(eps=0.01))"
    )


def test_recipe_is_what_it_says():
    # The oracle's own settings reach the solver.
    assert Recipe(momentum=0.3, nesterov=True).solver(2) == mf.SGD(0.05, 2, 0.3, True)
