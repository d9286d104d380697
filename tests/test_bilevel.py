"""bilevel, hypergrad and adapt: the contract of the three verbs, and what they refuse."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from problems import FAST, Quadratic, assert_close, maml, network
from torch import nn

import metafocus as mf

pytestmark = pytest.mark.usefixtures("float64")

W = {"w": torch.tensor([1.0, -2.0]).double().requires_grad_()}
EPISODE = mf.Episode(torch.tensor([0.5, 0.5]).double(), torch.tensor([1.0, 0.0]).double())
ESTIMATORS = {
    "FirstOrder": mf.FirstOrder(),
    "graph": mf.Unrolled(),
    "recompute": mf.Unrolled(recompute=True),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "Implicit": mf.Implicit(mf.CG(2)),
}
EXPLICIT = ["recompute", "forward", "Implicit"]


def loss(fast, slow, x):
    return ((fast["w"] - x) ** 2).sum() + 0.1 * ((fast["w"] - slow["w"]) ** 4).sum()


PROBLEM = mf.Problem(loss, loss, lambda slow, support: dict(slow))


def build(estimator=ESTIMATORS["graph"], solver=None, problem=PROBLEM):
    return mf.bilevel(problem, solver=solver or mf.SGD(0.1, 30), estimator=estimator)


# --- the shape of the answers -----------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_meta_loss_returns_a_scalar_and_detached_aux(name):
    leaf = {"w": W["w"].detach().clone().requires_grad_()}
    value, aux = build(ESTIMATORS[name])(leaf, EPISODE)
    assert value.shape == () and value.requires_grad
    assert isinstance(aux, mf.Aux)
    assert list(aux.params) == ["w"] and not aux.params["w"].requires_grad
    assert aux.inner_losses.shape == (30,) and not aux.inner_losses.requires_grad
    assert aux.inner_losses[0] == loss(W, W, EPISODE.support)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_episode_may_be_a_plain_tuple(name):
    meta = build(ESTIMATORS[name])
    assert torch.equal(meta(W, tuple(EPISODE))[0], meta(W, EPISODE)[0])


@pytest.mark.parametrize("episode", [torch.stack(EPISODE), dict(EPISODE._asdict()), EPISODE[:1]])
def test_what_only_looks_like_a_pair_is_no_episode(episode):
    with pytest.raises(
        mf.errors.ProblemError, match=r"episode must be mf\.Episode\(support, query\)"
    ):
        build()(W, episode)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_grad_gives_the_value_without_a_graph(name):
    leaf = {"w": W["w"].detach().clone().requires_grad_()}
    meta = build(ESTIMATORS[name])
    with torch.no_grad():
        value, _ = meta(leaf, EPISODE)
    assert not value.requires_grad
    assert torch.equal(value, meta(leaf, EPISODE)[0].detach())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_inference_mode_is_refused_because_nothing_would_adapt(name):
    with (
        torch.inference_mode(),
        pytest.raises(mf.errors.TransformError, match=r"Use torch\.no_grad\(\)"),
    ):
        build(ESTIMATORS[name])(W, EPISODE)
    with torch.inference_mode(), pytest.raises(mf.errors.TransformError, match="would not adapt"):
        mf.adapt(PROBLEM, W, EPISODE.support, solver=mf.SGD(0.1, 1))


def test_outer_is_not_changed_and_no_grad_is_filled_by_hypergrad():
    leaf = {"w": W["w"].detach().clone().requires_grad_()}
    for name in ESTIMATORS:
        mf.hypergrad(build(ESTIMATORS[name]))(leaf, EPISODE)
        assert leaf["w"].grad is None
        assert torch.equal(leaf["w"].detach(), W["w"])
        assert list(leaf) == ["w"]


# --- hypergrad -----------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_hypergrad_is_func_grad_and_value(name):
    meta, outer = build(ESTIMATORS[name]), {"w": W["w"].detach()}
    grads, (value, aux) = mf.hypergrad(meta)(outer, EPISODE)
    want, (same, other) = torch.func.grad_and_value(meta, has_aux=True)(outer, EPISODE)
    # Two back ends: order of operations.
    assert_close(grads, want, 1e-13)
    assert_close(value, same, 1e-15)
    assert_close(aux.params, other.params, 1e-15)
    assert not grads["w"].requires_grad and not value.requires_grad
    inside, _ = torch.func.vmap(mf.hypergrad(meta), in_dims=(None, 0))(
        outer, mf.Episode(*(x[None] for x in EPISODE))
    )
    assert_close(inside["w"][0], want["w"], 1e-13)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_hypergrad_can_be_differentiated_where_outer_requires_grad(name):
    meta = build(ESTIMATORS[name])
    leaf = {"w": W["w"].detach().clone().requires_grad_()}
    grads, (value, _) = mf.hypergrad(meta)(leaf, EPISODE)
    assert grads["w"].requires_grad and value.requires_grad
    (tape,) = torch.autograd.grad(grads["w"].sum(), leaf["w"])
    want = torch.func.grad(lambda o: torch.func.grad(lambda p: meta(p, EPISODE)[0])(o)["w"].sum())(
        W
    )
    assert_close(tape, want["w"], 1e-11)
    with torch.no_grad():
        grads, (value, _) = mf.hypergrad(meta)(leaf, EPISODE)
    assert not grads["w"].requires_grad and not value.requires_grad


def test_hypergrad_gives_zeros_where_nothing_depends():
    outer = {**W, "unused": torch.ones(3)}
    problem = mf.Problem(loss, loss, lambda slow, support: {"w": slow["w"]})
    for name in ESTIMATORS:
        grads, _ = mf.hypergrad(build(ESTIMATORS[name], problem=problem))(outer, EPISODE)
        assert list(grads) == ["w", "unused"]
        assert torch.equal(grads["unused"], torch.zeros(3))
    constant = mf.Problem(loss, lambda fast, slow, x: x.sum())
    with pytest.raises(mf.errors.ProblemError, match="depends on none of the fast weights"):
        mf.hypergrad(build(problem=constant))(W, EPISODE)


def test_an_outer_loss_is_tried_at_the_first_call_that_takes_gradients():
    constant = mf.Problem(loss, lambda fast, slow, x: (slow["w"] ** 2).sum())
    meta = build(problem=constant)
    # Under no_grad it may be a metric without a derivative.
    with torch.no_grad():
        assert meta(W, EPISODE)[0] == (W["w"] ** 2).sum()
    for _ in range(2):
        with pytest.raises(mf.errors.ProblemError, match="depends on none of the fast weights"):
            mf.hypergrad(meta)(W, EPISODE)


def test_hypergrad_of_a_partly_trainable_outer():
    outer = {"w": W["w"].detach().clone().requires_grad_(), "c": torch.tensor(2.0)}
    problem = mf.Problem(
        lambda fast, slow, x: ((fast["w"] - slow["c"] * x) ** 2).sum(),
        lambda fast, slow, x: (fast["w"] ** 2).sum(),
        lambda slow, support: {"w": slow["w"]},
    )
    grads, _ = mf.hypergrad(build(problem=problem))(outer, EPISODE)
    plain, _ = mf.hypergrad(build(problem=problem))(
        {k: v.detach() for k, v in outer.items()}, EPISODE
    )
    assert_close({k: v.detach() for k, v in grads.items()}, plain, 1e-14)


# --- adapt -----------------------------------------


def test_adapt_is_the_inner_loop_and_keeps_no_graph():
    leaf = {"w": W["w"].detach().clone().requires_grad_()}
    solver = mf.SGD(0.1, 7, momentum=0.5)
    solution = mf.adapt(PROBLEM, leaf, EPISODE.support, solver=solver)
    _, aux = build(solver=solver)(leaf, EPISODE)
    assert isinstance(solution, mf.Solution)
    assert torch.equal(solution.params["w"], aux.params["w"])
    assert torch.equal(solution.losses, aux.inner_losses)
    assert not solution.params["w"].requires_grad and not solution.losses.requires_grad


def test_adapt_works_under_no_grad_and_under_vmap():
    solver = mf.SGD(0.1, 7)
    want = mf.adapt(PROBLEM, W, EPISODE.support, solver=solver)
    with torch.no_grad():
        got = mf.adapt(PROBLEM, W, EPISODE.support, solver=solver)
    assert torch.equal(got.params["w"], want.params["w"])
    many = torch.stack([EPISODE.support, EPISODE.query])
    got = torch.func.vmap(lambda x: mf.adapt(PROBLEM, W, x, solver=solver))(many)
    # The other back end.
    assert_close(got.params["w"][0], want.params["w"], 1e-14)
    assert got.losses.shape == (2, 7)


def test_adapt_prepares_the_support():
    for wrap in (mf.Episode, lambda a, b: (a, b)):
        problem = dataclasses.replace(
            PROBLEM, prepare=lambda slow, e, wrap=wrap: wrap(2 * e.support, e.query)
        )
        got = mf.adapt(problem, W, EPISODE.support, solver=mf.SGD(0.1, 3))
        want = mf.adapt(PROBLEM, W, 2 * EPISODE.support, solver=mf.SGD(0.1, 3))
        assert torch.equal(got.params["w"], want.params["w"])


def test_adapt_accepts_zero_steps_no_weights_and_no_outer():
    start = mf.adapt(PROBLEM, W, EPISODE.support, solver=mf.SGD(0.1, 0))
    assert torch.equal(start.params["w"], W["w"]) and start.losses.shape == (0,)
    empty = mf.Problem(lambda f, s, x: x.sum(), loss, lambda slow, support: {})
    nothing = mf.adapt(empty, W, EPISODE.support, solver=mf.Adam(0.1, 3))
    assert nothing.params == {} and nothing.losses.shape == (0,)
    own = mf.Problem(
        lambda f, s, x: ((f["w"] - x) ** 2).sum(), loss, lambda slow, support: {"w": torch.zeros(2)}
    )
    assert mf.adapt(own, {}, EPISODE.support, solver=mf.SGD(0.5, 1)).params["w"].tolist() == [
        0.5,
        0.5,
    ]


# --- outer = {} ----------------------------------------------------------------------------------


def _module():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


def _closed_problem(module):
    """Fast weights for the last layer, the module's parameters through closures."""

    def inner(fast, slow, data):
        x, y = data
        h = torch.tanh(module[0](x))
        return ((h @ (module[2].weight + fast["delta"]).T + module[2].bias - y) ** 2).mean()

    return mf.Problem(inner, inner, lambda slow, support: {"delta": torch.zeros(1, 4)})


@pytest.mark.parametrize("name", ["FirstOrder", "graph"])
def test_an_empty_outer_fills_the_modules_gradients(name):
    case, module = maml(), _module()
    meta = build(ESTIMATORS[name], mf.SGD(0.1, 3), _closed_problem(module))
    meta({}, case.episode(0))[0].backward()
    got = [p.grad for p in module.parameters()]
    assert all(g is not None and g.any() for g in got)

    # The same with every parameter explicit.
    def inner(fast, slow, data):
        x, y = data
        net = {**slow, "2.weight": slow["2.weight"] + fast["delta"]}
        return ((network(net, x) - y) ** 2).mean()

    problem = mf.Problem(inner, inner, lambda slow, support: {"delta": torch.zeros(1, 4)})
    outer = {k: v.detach() for k, v in module.named_parameters()}
    want, _ = mf.hypergrad(build(ESTIMATORS[name], mf.SGD(0.1, 3), problem))(outer, case.episode(0))
    # Fused linear layers against products written out.
    assert_close(dict(zip(want, got, strict=True)), want, 1e-12)


@pytest.mark.parametrize("name", EXPLICIT)
def test_an_empty_outer_is_refused_where_tensors_must_be_explicit(name):
    with pytest.raises(
        mf.errors.ProblemError,
        match=r"outer=\{\} with .*Pass mf.trainable\(model\) as outer \(never "
        r"state_dict\(\).*or use Unrolled\(\) or FirstOrder\(\)",
    ):
        build(ESTIMATORS[name], problem=_closed_problem(_module()))({}, maml().episode(0))


def test_hypergrad_of_an_empty_outer_is_empty():
    grads, (value, _) = mf.hypergrad(build(problem=_closed_problem(_module())))(
        {}, maml().episode(0)
    )
    assert grads == {} and not value.requires_grad


# --- refusals -----------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda w: w, r"outer_loss must return a scalar, got shape \[2\]. Reduce it: .mean\(\)"),
        (lambda w: w.sum().long(), "outer_loss must return a floating-point scalar, got torch.int"),
        (lambda w: 1.0, "outer_loss must return a scalar tensor, got float"),
    ],
)
def test_outer_losses_that_are_no_scalars(name, result, message):
    problem = mf.Problem(loss, lambda fast, slow, x: result(fast["w"]))
    with pytest.raises(mf.errors.ProblemError, match=message):
        build(ESTIMATORS[name], problem=problem)(W, EPISODE)


@pytest.mark.parametrize("verb", ["meta_loss", "hypergrad", "adapt"])
@pytest.mark.parametrize(
    ("outer", "message"),
    [
        ({"w": torch.ones(2).long()}, "outer holds 'w' of dtype torch.int64; only floating-point"),
        ({"w": [1.0]}, "outer holds 'w' of type list; outer parameters are tensors"),
        (
            nn.Linear(1, 1),
            r"outer must be a dict of tensors .* mf.trainable\(module\)",
        ),
    ],
)
def test_outer_parameters_that_cannot_be(verb, outer, message):
    with pytest.raises(mf.errors.ProblemError, match=message):
        if verb == "adapt":
            mf.adapt(PROBLEM, outer, EPISODE.support, solver=mf.SGD(0.1, 1))
        elif verb == "hypergrad":
            mf.hypergrad(build())(outer, EPISODE)
        else:
            build()(outer, EPISODE)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("init", "message"),
    [
        (lambda slow, _: slow["w"], "init must be a dict of tensors .*got Tensor"),
        (lambda slow, _: {"w": torch.ones(2).int()}, "init holds 'w' of dtype torch.int32"),
        (lambda slow, _: {"w": 1.0}, "init holds 'w' of type float; fast weights are tensors"),
        (lambda slow, _: None, "init must be a dict of tensors .*got NoneType"),
    ],
)
def test_starts_that_cannot_be(name, init, message):
    problem = mf.Problem(loss, loss, init)
    with pytest.raises(mf.errors.ProblemError, match=message):
        build(ESTIMATORS[name], problem=problem)(W, EPISODE)
    with pytest.raises(mf.errors.ProblemError, match=message):
        mf.adapt(problem, W, EPISODE.support, solver=mf.SGD(0.1, 1))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_infinite_inner_loss_names_its_step(name):
    # 2 x, then lr = 1e200 throws it out of range: inf at the third loss.
    problem = mf.Problem(lambda f, s, x: ((f["w"] - x) ** 2).sum(), loss)
    meta = build(ESTIMATORS[name], mf.SGD(1e100, 4), problem)
    for call in (
        lambda: meta(W, EPISODE),
        lambda: mf.hypergrad(meta)(W, EPISODE),
        lambda: mf.adapt(problem, W, EPISODE.support, solver=mf.SGD(1e100, 4)),
    ):
        with pytest.raises(
            mf.errors.NonFiniteError,
            match=r"inner_loss is inf before inner step 2\. Lower the solver's",
        ):
            call()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_nan_inner_loss_is_refused_at_any_call(name):
    meta = build(ESTIMATORS[name], mf.SGD(0.1, 20))
    meta(W, EPISODE)
    bad = mf.Episode(torch.tensor([float("nan"), 0.0]), EPISODE.query)
    with pytest.raises(mf.errors.NonFiniteError, match=r"inner_loss is nan before inner step 0"):
        meta(W, bad)


@pytest.mark.parametrize("decay", [0.1, 1e-6])
def test_weight_decay_with_implicit_is_refused(decay):
    for solver in (mf.SGD(0.1, 3, weight_decay=decay), mf.Adam(0.1, 3, weight_decay=decay)):
        with pytest.raises(
            mf.errors.ProblemError,
            match=rf"weight_decay={decay} moves .*Set weight_decay=0 and add the decay",
        ):
            build(mf.Implicit(), solver)(W, EPISODE)


# --- stationarity -----------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 5, 20])
@pytest.mark.parametrize("way", ["call", "func.grad", "hypergrad"])
def test_implicit_warns_far_from_the_minimum(steps, way):
    quadratic = Quadratic()
    case = quadratic.case()
    meta = mf.bilevel(
        case.problem, solver=mf.SGD(quadratic.lr / 3, steps), estimator=mf.Implicit(mf.CG(5))
    )
    with pytest.warns(
        mf.errors.NotStationaryWarning,
        match=r"the inner gradient norm is .* of its initial .* Take more inner steps",
    ):
        if way == "call":
            with torch.no_grad():
                meta(case.outer, case.episode(0))
        elif way == "hypergrad":
            mf.hypergrad(meta)(case.outer, case.episode(0))
        else:
            torch.func.grad(lambda o: meta(o, case.episode(0))[0])(case.outer)


def test_implicit_does_not_warn_at_the_minimum():
    quadratic = Quadratic()
    case = quadratic.case()
    best = quadratic.minimum(quadratic.phi, quadratic.support[0])
    near = mf.bilevel(
        case.problem, solver=mf.SGD(quadratic.lr, 1200), estimator=mf.Implicit(mf.CG(5))
    )
    # 0.98^1200 = 3e-11; and a start at the minimum itself, where noise is compared with noise.
    at = mf.bilevel(
        mf.Problem(
            quadratic.inner, quadratic.outer_loss, lambda _, support: quadratic.split(best.clone())
        ),
        solver=mf.SGD(quadratic.lr, 3),
        estimator=mf.Implicit(mf.CG(5)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mf.hypergrad(near)(case.outer, case.episode(0))
        mf.hypergrad(at)(case.outer, case.episode(0))


def test_the_warning_says_how_far():
    quadratic = Quadratic()
    case = quadratic.case()
    meta = mf.bilevel(
        case.problem, solver=mf.SGD(quadratic.lr, 30), estimator=mf.Implicit(mf.CG(5))
    )

    def size(x):
        e = x - quadratic.B @ quadratic.phi
        return (quadratic.H @ e - quadratic.support[0]).norm().item()

    before = size(quadratic.A @ quadratic.phi)
    after = size(quadratic.iterate(quadratic.phi, quadratic.support[0], 30))
    with pytest.warns(
        mf.errors.NotStationaryWarning,
        match=f"norm is {after:.3g} at the solution, "
        f"{after / before:.2g} of its initial {before:.3g};",
    ):
        mf.hypergrad(meta)(case.outer, case.episode(0))


def test_other_estimators_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("FirstOrder", "graph", "recompute"):
            build(ESTIMATORS[name], mf.SGD(1e-3, 1))(W, EPISODE)


# --- values -----------------------------------------


def test_estimators_and_problems_are_values():
    assert mf.Implicit(mf.CG(3)) == mf.Implicit(mf.CG(3))
    assert mf.Unrolled(last=2) != mf.Unrolled()
    for estimator in ESTIMATORS.values():
        assert pickle.loads(pickle.dumps(estimator)) == estimator
    assert mf.Problem(loss, loss) == mf.Problem(loss, loss)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mf.Unrolled().last = 3


def test_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        mf.bilevel(PROBLEM, mf.SGD(0.1, 1), mf.Unrolled())
    with pytest.raises(TypeError):
        mf.adapt(PROBLEM, W, EPISODE.support, mf.SGD(0.1, 1))


def test_one_meta_loss_serves_changing_shapes():
    meta = build(
        problem=mf.Problem(
            lambda f, s, x: ((f["w"] * x) ** 2).mean(), lambda f, s, x: (f["w"] * x).sum()
        )
    )
    for n in (1, 5, 2):
        x = torch.ones(n, 2)
        assert meta(W, (x, x))[0].isfinite()
    assert set(FAST) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_training_descends():
    # A whole outer loop: the meta loss of a quadratic falls to its minimum.
    quadratic = Quadratic()
    case = quadratic.case()
    leaf = {"phi": torch.zeros(3, requires_grad=True)}
    meta = mf.over_tasks(
        mf.bilevel(case.problem, solver=mf.SGD(quadratic.lr, 5), estimator=mf.Unrolled())
    )
    optimizer = torch.optim.LBFGS(leaf.values(), line_search_fn="strong_wolfe", max_iter=50)

    def closure():
        optimizer.zero_grad()
        value, _ = meta(leaf, case.episodes)
        value.backward()
        return value

    optimizer.step(closure)
    closure()
    # LBFGS stops at a gradient of 1e-7.
    assert leaf["phi"].grad.norm() < 1e-5


DEEP = """
import metafocus as mf, torch
def loss(fast, slow, x):
    return ((torch.tanh(torch.tanh(x @ fast["a"]) @ fast["b"]) @ fast["c"] - 1) ** 2).mean()
def recurrent(fast, slow, x):
    x = x @ fast["a"]
    for _ in range(20_000):
        x = torch.tanh(x @ fast["b"])
    return (x @ fast["c"]).mean()
outer = {"a": torch.ones(1, 2), "b": torch.eye(2), "c": torch.ones(2, 1)}
outer = {k: v.requires_grad_() for k, v in outer.items()}
"""
LONG = {
    "steps": """
meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.02, 7000), estimator=mf.Unrolled())
value, aux = meta(outer, mf.Episode(torch.ones(3, 1), torch.ones(3, 1)))
""",
    "steps of chunks": """
meta = mf.bilevel(mf.Problem(loss, loss), solver=mf.SGD(0.02, 7000), estimator=mf.Unrolled())
tasks = torch.ones(2, 3, 1)
value, aux = mf.over_tasks(meta, how="loop")(outer, mf.Episode(tasks, tasks))
""",
    "one loss": """
problem = mf.Problem(recurrent, recurrent)
meta = mf.bilevel(problem, solver=mf.SGD(0.02, 1), estimator=mf.FirstOrder())
value, aux = meta(outer, mf.Episode(torch.ones(3, 1), torch.ones(3, 1)))
""",
}


@pytest.mark.parametrize("graph", LONG)
def test_a_long_graph_is_freed(graph):
    """A graph whose nodes were looked at, and are freed in any other order, ends the process."""
    code = DEEP + LONG[graph] + "value.backward(); del value, aux; print('freed')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "freed\n", (done.returncode, done.stderr)
