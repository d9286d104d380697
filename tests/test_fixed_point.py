"""Fixed points of contractions against closed forms, in every way of differentiating."""

from __future__ import annotations

import contextlib

import pytest
import torch
from problems import F64, Ridge, assert_close, grads_of
from ways import WAYS, expected

import metafocus as mf

pytestmark = pytest.mark.usefixtures("float64")

LR = 0.2
RIDGE = Ridge()


def gradient_step(fast, slow, data):
    """One step of gradient descent on the ridge problem, for which it contracts."""
    grads = torch.func.grad(RIDGE.inner)(fast, slow, data)
    return {"w": fast["w"] - LR * grads["w"]}


def crooked_step(fast, slow, data):
    """The same fixed point by a map that is not symmetric: a triangular preconditioner."""
    grads = torch.func.grad(RIDGE.inner)(fast, slow, data)
    mix = LR * (torch.eye(4) + 0.5 * torch.ones(4, 4).triu(1))
    return {"w": fast["w"] - mix @ grads["w"]}


def newton_step(fast, slow, data):
    x, y = data
    gram = x.T @ x / len(x) + torch.diag(slow["log_l2"].exp())
    rest = gram @ fast["w"] - x.T @ y / len(x)
    return {"w": fast["w"] - torch.linalg.solve(gram.detach(), rest)}


def closed_form(slow, data):
    x, y = data
    gram = x.T @ x / len(x) + torch.diag(slow["log_l2"].exp())
    return {"w": torch.linalg.solve(gram, x.T @ y / len(x))}


SOLVERS = {"SGD": mf.SGD(LR, 150, momentum=0.5), "Given": mf.Given(closed_form)}
# The slowest mode of the ridge contracts by 0.8 a step: 0.8^150 = 3e-15.
EXACT = {
    "Neumann": mf.FixedPoint(gradient_step, mf.Neumann(150, 1.0)),
    "GMRES": mf.FixedPoint(gradient_step, mf.GMRES(4)),
    "crooked GMRES": mf.FixedPoint(crooked_step, mf.GMRES(4)),
    "crooked Neumann": mf.FixedPoint(crooked_step, mf.Neumann(150, 1.0)),
    "Dense": mf.FixedPoint(crooked_step, mf.Dense()),
    "CG": mf.FixedPoint(gradient_step, mf.CG(4)),
    "warm": mf.FixedPoint(crooked_step, mf.WarmStart(mf.GMRES(4), {"w": torch.ones(4, dtype=F64)})),
    "one Newton step": mf.OneStep(newton_step),
}


def exact_gradients():
    case, found = RIDGE.case(), []
    for i in range(case.tasks):
        leaf = case.leaves()
        RIDGE.meta(leaf["log_l2"], i).backward()
        found.append(grads_of(leaf))
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", EXACT)
def test_fixed_point_is_the_closed_form(name, solver, way):
    case = RIDGE.case()
    meta = mf.bilevel(case.problem, solver=SOLVERS[solver], estimator=EXACT[name])
    # The inner loop and the series have converged to rounding.
    assert_close(WAYS[way](meta, case), expected(exact_gradients(), way), 1e-10)


@pytest.mark.parametrize("terms", [1, 3])
def test_neumann_is_a_finite_number_of_adjoint_steps(terms):
    case = RIDGE.case()
    data = case.episode(0).support
    meta = mf.bilevel(
        case.problem,
        solver=SOLVERS["Given"],
        estimator=mf.FixedPoint(crooked_step, mf.Neumann(terms, 1.0)),
    )
    fast = closed_form(case.outer, data)

    def by_fast(w):
        return crooked_step({"w": w}, case.outer, data)["w"]

    def by_slow(log_l2):
        return crooked_step(fast, {"log_l2": log_l2}, data)["w"]

    jacobian = torch.func.jacrev(by_fast)(fast["w"])
    v = torch.func.grad(lambda w: RIDGE.outer_loss({"w": w}, {}, case.episode(0).query))(fast["w"])
    u = sum(torch.linalg.matrix_power(jacobian.T, j) @ v for j in range(terms))
    want = torch.func.jacrev(by_slow)(case.outer["log_l2"]).T @ u
    with contextlib.ExitStack() as stack:
        if terms > 1:
            stack.enter_context(pytest.warns(mf.errors.NotConvergedWarning, match="the last term"))
        got, _ = mf.hypergrad(meta)(case.outer, case.episode(0))
    # The same sums by matrices.
    assert_close(got["log_l2"], want, 1e-12)
    if terms == 1:
        one = mf.bilevel(case.problem, solver=SOLVERS["Given"], estimator=mf.OneStep(crooked_step))
        assert_close(mf.hypergrad(one)(case.outer, case.episode(0))[0], got, 1e-15)


def test_the_support_is_an_explicit_input_too():
    case = RIDGE.case()
    x, y = case.episode(0).support
    query = case.episode(0).query
    meta = mf.bilevel(case.problem, solver=SOLVERS["Given"], estimator=EXACT["crooked GMRES"])
    got = torch.func.grad(lambda y: meta(case.outer, mf.Episode((x, y), query))[0])(y)
    want = torch.func.grad(lambda y: RIDGE.outer_loss(closed_form(case.outer, (x, y)), {}, query))(
        y
    )
    # Rounding times a condition number of about 10.
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("name", ["GMRES", "crooked GMRES", "Dense", "CG", "crooked Neumann"])
def test_second_derivatives_and_forward_mode(name):
    case = RIDGE.case()
    meta = mf.bilevel(case.problem, solver=SOLVERS["Given"], estimator=EXACT[name])
    point, direction = case.outer["log_l2"], torch.tensor([1.0, -2.0, 0.5, 3.0])

    def loss(p):
        return meta({"log_l2": p}, case.episode(0))[0]

    want = torch.func.jacrev(torch.func.grad(lambda p: RIDGE.meta(p, 0)))(point)
    first = torch.func.grad(lambda p: RIDGE.meta(p, 0))(point)
    for outside in (torch.func.jacrev, torch.func.jacfwd):
        # Rounding times the square of the condition number.
        assert_close(outside(torch.func.grad(loss))(point), want, 1e-9)
    assert_close(torch.func.jacrev(torch.func.jacfwd(loss))(point), want, 1e-9)
    leaf = point.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    assert_close(torch.autograd.grad(grad @ direction, leaf)[0], want @ direction, 1e-9)
    _, along = torch.func.jvp(loss, (point,), (direction,))
    assert abs(along - first @ direction) < 1e-10 * abs(first @ direction)
    with pytest.raises(mf.errors.TransformError, match="two nested"):
        torch.func.jacfwd(torch.func.jacfwd(loss))(point)


def test_a_deep_equilibrium_layer():
    g = torch.Generator().manual_seed(2)
    W = torch.randn(5, 5, generator=g, dtype=F64)
    W = 0.8 * W / torch.linalg.matrix_norm(W, 2)
    outer = {"W": W, "U": torch.randn(5, 3, generator=g, dtype=F64)}
    episode = mf.Episode(torch.randn(3, generator=g, dtype=F64), torch.ones(5, dtype=F64))

    def layer(fast, slow, x):
        return {"z": torch.tanh(slow["W"] @ fast["z"] + slow["U"] @ x)}

    def iterate(slow, x):
        z = {"z": torch.zeros(5)}
        for _ in range(200):
            z = layer(z, slow, x)
        return z

    problem = mf.Problem(
        lambda fast, slow, x: ((fast["z"] - layer(fast, slow, x)["z"]) ** 2).sum(),
        lambda fast, slow, q: (fast["z"] * q).sum() ** 2,
        lambda slow, support: {"z": torch.zeros(5)},
    )
    want = torch.func.grad(
        lambda o: problem.outer_loss(iterate(o, episode.support), o, episode.query)
    )(outer)
    for solve in (mf.GMRES(5), mf.Neumann(200, 1.0), mf.Dense()):
        meta = mf.bilevel(problem, solver=mf.Given(iterate), estimator=mf.FixedPoint(layer, solve))
        # 0.8^200 = 4e-20: both have converged to rounding.
        assert_close(mf.hypergrad(meta)(outer, episode)[0], want, 1e-11)


def test_a_projected_method_has_no_stationary_point_of_the_loss():
    # min 0.5 |w - c|^2 over w >= 0: the gradient does not vanish where w = 0.
    def project(fast, slow, x):
        return {"w": torch.relu(fast["w"] - 0.5 * (fast["w"] - slow["c"]))}

    problem = mf.Problem(
        lambda fast, slow, x: 0.5 * ((fast["w"] - slow["c"]) ** 2).sum(),
        lambda fast, slow, x: fast["w"].sum(),
        lambda slow, support: {"w": torch.ones(2)},
    )
    solver = mf.Given(lambda slow, x: {"w": slow["c"].clamp(min=0.0)})
    estimator = mf.FixedPoint(project, mf.GMRES(2))
    meta = mf.bilevel(problem, solver=solver, estimator=estimator)
    grads, _ = mf.hypergrad(meta)({"c": torch.tensor([2.0, -1.0])}, mf.Episode(None, None))
    # w* = max(c, 0).
    assert_close(grads["c"], torch.tensor([1.0, 0.0]), 1e-14)


def test_a_solution_that_is_not_fixed_is_warned_about():
    case = RIDGE.case()
    meta = mf.bilevel(case.problem, solver=mf.SGD(LR, 1), estimator=EXACT["GMRES"])
    warned = pytest.warns(mf.errors.NotStationaryWarning, match=r"FixedPoint: the residual \|step")
    with torch.no_grad(), warned:
        meta(case.outer, case.episode(0))


def contraction(rate):
    """`w = rate w + c`: the adjoint series has the terms rate^j."""
    return mf.bilevel(
        mf.Problem(
            lambda fast, slow, x: ((fast["w"] - slow["c"] / (1 - rate)) ** 2).sum(),
            lambda fast, slow, x: fast["w"].sum(),
            lambda slow, support: {"w": torch.zeros(2)},
        ),
        solver=mf.Given(lambda slow, x: {"w": slow["c"] / (1 - rate)}),
        estimator=mf.FixedPoint(lambda fast, slow, x: {"w": rate * fast["w"] + slow["c"]}),
    )


@pytest.mark.parametrize("way", ["backward", "hypergrad", "func.grad"])
@pytest.mark.parametrize("rate", [0.5, 0.78, 0.79, 0.99])
def test_the_default_says_when_the_step_contracts_too_slowly_for_it(rate, way):
    meta, leaf, empty = contraction(rate), {"c": torch.ones(2, requires_grad=True)}, (None, None)

    def run():
        if way == "backward":
            meta(leaf, empty)[0].backward()
            return grads_of(leaf)["c"]
        outer = {"c": torch.ones(2)}
        if way == "hypergrad":
            return mf.hypergrad(meta)(outer, empty)[0]["c"]
        return torch.func.grad(lambda o: meta(o, empty)[0])(outer)["c"]

    # The last term of twenty is rate^19: 0.0089 for 0.78 and 0.011 for 0.79.
    if rate > 0.785 and way != "func.grad":
        message = r"FixedPoint: the last term of Neumann\(steps=20.*from 0.01 on .*GMRES"
        with pytest.warns(mf.errors.NotConvergedWarning, match=message):
            got = run()
    else:
        got = run()  # a warning would be an error
    # The geometric sum.
    assert_close(got, torch.full((2,), (1 - rate**20) / (1 - rate)), 1e-12)


def test_a_map_without_a_unique_fixed_point_is_said():
    meta = mf.bilevel(
        mf.Problem(
            lambda fast, slow, x: ((fast["w"] - slow["c"]) ** 2).sum(),
            lambda fast, slow, x: fast["w"].sum(),
            lambda slow, support: {"w": torch.zeros(2)},
        ),
        solver=mf.Given(lambda slow, x: {"w": slow["c"]}),
        # Every point is fixed: I - J = 0.
        estimator=mf.FixedPoint(
            lambda fast, slow, x: {"w": fast["w"] + 0 * slow["c"]}, mf.GMRES(2)
        ),
    )
    with pytest.warns(mf.errors.NotConvergedWarning, match="I - d step / d fast is singular"):
        grads, _ = mf.hypergrad(meta)({"c": torch.ones(2)}, (None, None))
    assert grads["c"].isnan().all()


def test_refusals():
    case = RIDGE.case()

    def run(step, outer=case.outer):
        meta = mf.bilevel(case.problem, solver=SOLVERS["Given"], estimator=mf.FixedPoint(step))
        return meta(outer, case.episode(0))

    with pytest.raises(
        mf.errors.ProblemError, match="step must return a dict of fast weights, got Ten"
    ):
        run(lambda fast, slow, data: fast["w"])
    with pytest.raises(mf.errors.ProblemError, match="step must return the shapes"):
        run(lambda fast, slow, data: {"v": fast["w"]})
    hidden = torch.ones(4, requires_grad=True)
    with pytest.raises(mf.errors.ClosureError, match="step closes over"):
        run(lambda fast, slow, data: {"w": 0.5 * fast["w"] * hidden})
    with pytest.raises(mf.errors.ProblemError, match="outer=\\{\\}"):
        run(gradient_step, {})


def test_a_step_that_forgets_the_fast_weights_needs_no_solve():
    case = RIDGE.case()

    def jump(fast, slow, data):
        return closed_form(slow, data)

    meta = mf.bilevel(case.problem, solver=SOLVERS["Given"], estimator=mf.FixedPoint(jump))
    for way in ("backward", "func.grad", "vmap(grad)"):
        # J = 0, so the series ends after its first term.
        assert_close(WAYS[way](meta, case), expected(exact_gradients(), way), 1e-12)


def test_dropout_in_the_step_is_one_draw_for_all_products():
    def step(fast, slow, x):
        kept = torch.nn.functional.dropout(torch.ones(8), 0.5)
        return {"w": kept * (0.1 * fast["w"] + slow["c"])}

    problem = mf.Problem(
        lambda fast, slow, x: ((fast["w"] - slow["c"]) ** 2).sum(),
        lambda fast, slow, x: fast["w"].sum(),
        lambda slow, support: {"w": torch.zeros(8)},
    )
    solver = mf.Given(lambda slow, x: {"w": slow["c"]})
    meta = mf.bilevel(problem, solver=solver, estimator=mf.FixedPoint(step, mf.Neumann(40, 1.0)))
    with pytest.warns(mf.errors.NotStationaryWarning):
        grads, _ = mf.hypergrad(meta)({"c": torch.ones(8)}, (None, None))
    # 2 / (1 - 0.2) where doubled, 0 where dropped; a mixture of draws would give 2 or 1.25.
    assert all(min(abs(g - 2.5), abs(g)) < 1e-12 for g in grads["c"].tolist())
    assert 0 < (grads["c"] == 0).sum() < 8
