"""Given solutions, adjoints, every linear solver, and strategies of first order only."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import F64, Quadratic, Ridge, assert_close, grads_of, maml, relative_error
from test_penalty import (
    ATTENTION_OUTER,
    FORWARD,
    Kernels,
    attention,
    attention_episode,
    attention_problem,
    by_fused_attention,
    by_plain_attention,
    closed_form,
)
from ways import WAYS, expected, fast_sgd

import metafocus as mf
from metafocus.estimators.watched import Watched

pytestmark = pytest.mark.usefixtures("float64")

RIDGE = Ridge()
SOLVERS = {"SGD": mf.SGD(0.2, 150, momentum=0.5), "Given": mf.Given(closed_form)}
ZERO = {"w": torch.zeros(4, dtype=F64)}
ONE = {"w": torch.ones(4, dtype=F64)}
SOLVES = {
    "GMRES": mf.GMRES(4),
    "Neumann": mf.Neumann(200, 0.2),
    "Nystrom": mf.Nystrom(4, 1e-6),
    "warm CG": mf.WarmStart(mf.CG(4), ONE),
    "warm Neumann": mf.WarmStart(mf.Neumann(200, 0.2), ZERO),
    "warm Dense": mf.WarmStart(mf.Dense(), ONE),
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
@pytest.mark.parametrize("name", SOLVES)
def test_implicit_with_every_linear_solver_is_the_closed_form(name, solver, way):
    case = RIDGE.case()
    estimator = mf.Implicit(SOLVES[name])
    meta = mf.bilevel(case.problem, solver=SOLVERS[solver], estimator=estimator)
    # Rounding; for Nystrom its damping of 1e-6 over the smallest eigenvalue, about 1.
    tolerance = 2e-6 if name == "Nystrom" else 1e-10
    assert_close(WAYS[way](meta, case), expected(exact_gradients(), way), tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_implicit_with_identity_is_its_formula(way):
    quadratic = Quadratic()
    case = quadratic.case()
    estimator = mf.Implicit(mf.Identity(0.03))
    meta = mf.bilevel(case.problem, solver=fast_sgd(quadratic), estimator=estimator)
    eye = 0.03 * torch.eye(5)
    found = [{"phi": quadratic.implicit(i, 10**6, eye)} for i in range(case.tasks)]
    # Both at the minimum up to rounding times the condition number.
    assert_close(WAYS[way](meta, case), expected(found, way), 1e-11)


@pytest.mark.parametrize("name", ["GMRES", "warm CG", "warm Dense", "Neumann"])
@pytest.mark.parametrize("hvp", [mf.hvp_reverse, mf.hvp_forward])
def test_second_derivatives(name, hvp):
    case = RIDGE.case()
    meta = mf.bilevel(
        case.problem, solver=SOLVERS["Given"], estimator=mf.Implicit(SOLVES[name], hvp)
    )
    point = case.outer["log_l2"]

    def loss(p):
        return meta({"log_l2": p}, case.episode(0))[0]

    want = torch.func.jacrev(torch.func.grad(lambda p: RIDGE.meta(p, 0)))(point)
    # Rounding times the square of the condition number.
    for outside in (torch.func.jacrev, torch.func.jacfwd):
        assert_close(outside(torch.func.grad(loss))(point), want, 1e-10)
    leaf = point.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    assert_close(torch.autograd.grad(grad[1], leaf)[0], want[1], 1e-10)
    # One transform above the tape: the hypergradient may still be differentiated by the tape.
    assert_close(torch.autograd.grad(torch.func.grad(loss)(leaf)[1], leaf)[0], want[1], 1e-10)
    rows = torch.func.vmap(lambda v: torch.func.vjp(torch.func.grad(loss), point)[1](v)[0])
    assert_close(rows(torch.eye(len(point))), want, 1e-10)


@pytest.mark.parametrize("way", ["jacrev", "jacfwd", "tape"])
def test_second_derivatives_where_cg_converges_early(way):
    # H = I at this point, so CG is done after one step; its derivative must not be.
    b, q = torch.tensor([1.0, 2.0]), torch.tensor([0.3, -0.7])
    problem = mf.Problem(
        lambda f, s, x: 0.5 * (s["a"].exp() * f["w"] ** 2).sum() - (b * f["w"]).sum(),
        lambda f, s, x: 0.5 * ((f["w"] - q) ** 2).sum(),
        lambda s, support: {"w": torch.zeros(2)},
    )
    a = torch.zeros(2)
    want = torch.func.hessian(lambda a: 0.5 * ((b * (-a).exp() - q) ** 2).sum())(a)
    for solve in (mf.CG(5), mf.GMRES(5)):
        meta = mf.bilevel(problem, solver=mf.SGD(1.0, 2), estimator=mf.Implicit(solve))

        def loss(a, meta=meta):
            return meta({"a": a}, (torch.zeros(1), torch.zeros(1)))[0]

        if way == "tape":
            leaf = a.clone().requires_grad_()
            (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
            rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in grad]
            got = torch.stack(rows)
        else:
            got = getattr(torch.func, way)(torch.func.grad(loss))(a)
        # Two exact steps.
        assert_close(got, want, 1e-13)


# --- systems without a solution, types and scales ------------------------------------------------


def by_tape(meta, outer):
    leaf = {k: v.clone().requires_grad_() for k, v in outer.items()}
    meta(leaf, (None, None))[0].backward()
    return grads_of(leaf)


def by_two_tasks(meta, outer):
    empty = torch.zeros(2, 0)
    return torch.func.grad(lambda o: mf.over_tasks(meta)(o, (empty, empty))[0])(outer)


LOOKS = {
    "backward": by_tape,
    "hypergrad": lambda m, o: mf.hypergrad(m)(o, (None, None))[0],
    "func.grad": lambda m, o: torch.func.grad(lambda o: m(o, (None, None))[0])(o),
}
BLIND = {"grad(vmap)": by_two_tasks}


def flat_problem(*curvatures):
    """At the solution w = c the Hessian has twice these on its diagonal."""
    weight = torch.tensor(curvatures)
    return mf.Problem(
        lambda f, s, x: (weight * (f["w"] - s["c"]) ** 2).sum() + ((f["w"] - s["c"]) ** 4).sum(),
        lambda f, s, x: (f["w"] * torch.tensor([1.0, 2.0])).sum(),
        lambda s, support: {"w": torch.zeros(2)},
    )


def at_solution(solve, *curvatures):
    solver = mf.Given(lambda slow, x: {"w": slow["c"]})
    return mf.bilevel(flat_problem(*curvatures), solver=solver, estimator=mf.Implicit(solve))


WITHOUT = {
    "CG": mf.CG(3),
    "GMRES": mf.GMRES(3),
    "warm": mf.WarmStart(mf.CG(3), {"w": ONE["w"][:2]}),
}


@pytest.mark.parametrize("way", [*LOOKS, *BLIND])
@pytest.mark.parametrize("curvature", [0.0, 1.0], ids=["zero", "singular"])
@pytest.mark.parametrize("name", WITHOUT)
def test_a_singular_hessian_gives_nan_and_is_said(name, curvature, way):
    meta, outer = at_solution(WITHOUT[name], curvature, 0.0), {"c": torch.ones(2)}
    if way in BLIND:
        got = BLIND[way](meta, outer)  # a warning here would be an error
    else:
        with pytest.warns(
            mf.errors.NotConvergedWarning,
            match=r"Implicit: .*no finite solution of the linear system: the Hessian is singular",
        ):
            got = LOOKS[way](meta, outer)
    assert got["c"].isnan().all()


def test_what_else_a_singular_hessian_can_meet():
    outer = {"c": torch.ones(2)}
    dense = at_solution(mf.Dense(), 1.0, 0.0)
    for way in ("backward", "hypergrad"):
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):
            LOOKS[way](dense, outer)
    assert BLIND["grad(vmap)"](dense, outer)["c"].isnan().all()
    # H (H + d)^-1 v, for the flat coordinate 0.
    got = by_tape(at_solution(mf.Nystrom(2, 1e-3), 1.0, 0.0), outer)["c"]
    assert_close(got, torch.tensor([2 / 2.001, 0.0]), 1e-12)
    fast, cotangent = {"w": outer["c"]}, {"w": torch.ones(2)}
    with pytest.warns(mf.errors.NotConvergedWarning, match="adjoint: CG"):
        u = mf.adjoint(flat_problem(1.0, 0.0), outer, fast, None, cotangent, solve=mf.CG(3))
    assert u["w"].isnan().all()


@pytest.mark.parametrize("way", LOOKS)
@pytest.mark.parametrize("curvature", [(0.0, 0.0), (1.0, -0.5), (1.0, 30.0)], ids=str)
def test_a_neumann_series_that_does_not_converge_is_said(curvature, way):
    meta = at_solution(mf.Neumann(12, 0.25), *curvature)
    with pytest.warns(
        mf.errors.NotConvergedWarning, match=r"Implicit: the last term of Neumann\(steps=12"
    ):
        got = LOOKS[way](meta, {"c": torch.ones(2)})["c"]
    value = 2 * torch.tensor(curvature)
    series = sum(0.25 * (1 - 0.25 * value) ** j for j in range(12))
    # The truncation that it is.
    assert_close(got, value * series * torch.tensor([1.0, 2.0]), 1e-12)


def test_a_neumann_series_whose_terms_get_smaller_says_nothing():
    # Slow: compare reports how far it is.
    by_tape(at_solution(mf.Neumann(3, 0.25), 1.0, 0.1), {"c": torch.ones(2)})
    # No product, so nothing is known.
    by_tape(at_solution(mf.Neumann(1, 0.25), 0.0, 0.0), {"c": torch.ones(2)})


def test_finite_entries_with_an_infinite_sum_are_no_reason_to_warn():
    large = {"w": torch.full((2,), 3e38, dtype=torch.float32)}
    watched = Watched(mf.CG(1))
    watched.warn("Implicit", "the Hessian", large, 1.0, "")  # a warning here would be an error
    with pytest.warns(mf.errors.NotConvergedWarning):
        watched.warn("Implicit", "the Hessian", {"w": 2 * large["w"]}, 1.0, "")


@pytest.mark.parametrize("way", LOOKS)
def test_a_warm_start_of_a_series_that_does_not_converge_is_said(way):
    start = {"w": torch.tensor([0.5, 0.5])}
    meta = at_solution(mf.WarmStart(mf.Neumann(12, 0.25), start), 1.0, 30.0)
    with pytest.warns(mf.errors.NotConvergedWarning, match=r"the last term of WarmStart.*Neumann"):
        LOOKS[way](meta, {"c": torch.ones(2)})


def test_a_warm_start_at_the_solution_says_nothing():
    # v = (1, 2), H = diag(2, 60): a series that diverges from elsewhere.
    start = {"w": torch.tensor([1 / 2, 2 / 60])}
    meta = at_solution(mf.WarmStart(mf.Neumann(12, 0.25), start), 1.0, 30.0)
    got = by_tape(meta, {"c": torch.ones(2)})["c"]
    assert_close(got, torch.tensor([1.0, 2.0]), 1e-4)


def rotated(*eigenvalues, seed):
    """Return a matrix of these eigenvalues, and the sum of its eigenvectors."""
    draws = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=draws, dtype=F64))[0]
    return turn @ torch.diag(torch.tensor(eigenvalues, dtype=F64)) @ turn.T, turn.sum(1)


SPECTRA = {
    "positive": (1.0, 2, 3, 5, 8, 14),
    "indefinite": (-30.0, -2, -1, 1, 8, 60),
    # Rounded to a half type, none of its eigenvalues is zero.
    "singular": (0.0, 1, 1, 2, 3, 4),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("spectrum", "name"),
    # Dense does not mind an indefinite matrix, and a condition number of 60 is at the limit.
    [(s, n) for s in SPECTRA for n in ("CG", "Dense", "warm") if (s, n) != ("indefinite", "Dense")],
)
def test_a_half_type_that_is_too_narrow_for_a_system_is_said(spectrum, name, dtype, seed):
    A, b = rotated(*SPECTRA[spectrum], seed=seed)
    solves = {
        "CG": mf.CG(6),
        "Dense": mf.Dense(),
        "warm": mf.WarmStart(mf.CG(6), {"w": torch.zeros(6, dtype=dtype)}),
    }
    watched = Watched(solves[name])
    got = watched(lambda v: {"w": A.to(dtype) @ v["w"]}, {"w": b.to(dtype)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched.warn("Implicit", "the Hessian", got, 1.0, "")
    if spectrum != "positive":
        (only,) = caught
        assert issubclass(only.category, mf.errors.NotConvergedWarning)
        assert "float32" in str(only.message) or "no finite solution" in str(only.message)
    else:
        assert not caught
        # Rounding times a condition number of 14.
        assert relative_error(got["w"].double(), torch.linalg.solve(A, b)) < 0.06


def test_wider_types_cost_no_further_product():
    calls = []

    def matvec(v):
        calls.append(1)
        return {"w": 2 * v["w"]}

    for dtype, count in ((torch.float32, 3), (torch.bfloat16, 4)):
        Watched(mf.CG(3))(matvec, {"w": torch.ones(4, dtype=dtype)})
        assert len(calls) == count
        calls.clear()


HALF_SOLVES = {
    "CG": mf.CG(6),
    "GMRES": mf.GMRES(12),
    "Neumann": mf.Neumann(60, 0.4),
    "Dense": mf.Dense(),
    "Nystrom": mf.Nystrom(6, 1e-6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "hvp", [mf.hvp_reverse, mf.hvp_forward, mf.hvp_finite()], ids=["reverse", "forward", "finite"]
)
@pytest.mark.parametrize("name", HALF_SOLVES)
def test_any_type_and_any_scale_of_the_outer_loss(name, hvp, dtype):
    A, q = torch.linspace(1, 3, 6), torch.linspace(1, 2, 6)
    low, high = (x.to(dtype) for x in (A, q))

    def gradient(scale):
        problem = mf.Problem(
            lambda f, s, x: 0.5 * (low * f["w"] ** 2).sum() - (s["t"] * f["w"]).sum(),
            lambda f, s, x: scale * (high * f["w"]).sum(),
            lambda s, support: {"w": torch.zeros(6, dtype=dtype)},
        )
        solver = mf.Given(lambda slow, x: {"w": slow["t"] / low})
        meta = mf.bilevel(problem, solver=solver, estimator=mf.Implicit(HALF_SOLVES[name], hvp))
        got = mf.hypergrad(meta)({"t": torch.ones(6, dtype=dtype)}, (None, None))[0]["t"]
        assert got.dtype == dtype
        return got.double() / scale

    finite = hvp not in (mf.hvp_reverse, mf.hvp_forward)
    eps = torch.finfo(dtype).eps
    # A few roundings of the type; of differences u^(2/3).
    bound = 2 * eps ** (2 / 3) if finite else 8 * eps if dtype != torch.bfloat16 else 3 * eps
    for scale in (1e-4, 1.0, 1e3) if dtype == torch.float16 else (1e-36, 1e-24, 1.0, 1e30):
        assert_close(gradient(scale), q / A, max(bound, 2e-6))


# --- adjoint -------------------------------------------------------------------------------------


def test_adjoint_is_the_solve_and_starts_the_next_one():
    quadratic = Quadratic()
    case = quadratic.case()
    fast = quadratic.split(quadratic.minimum(quadratic.phi, quadratic.support[0]))
    v = quadratic.split(torch.linspace(-1, 1, 5))
    u = mf.adjoint(case.problem, case.outer, fast, quadratic.support[0], v, solve=mf.Dense())
    want = torch.linalg.solve(quadratic.H, quadratic.join(v))
    # Rounding times the condition number.
    assert_close(quadratic.join(u), want, 1e-12)
    assert not any(x.requires_grad for x in u.values())

    # One outer step later the right-hand side has moved a little; two products then do better
    # than four from nothing.
    q = case.episode(0).query
    right = quadratic.split(quadratic.Q @ (quadratic.join(fast) - q))
    u = mf.adjoint(case.problem, case.outer, fast, quadratic.support[0], right, solve=mf.CG(5))
    outer = {"phi": quadratic.phi + 1e-3}

    def error(solve):
        meta = mf.bilevel(case.problem, solver=fast_sgd(quadratic), estimator=mf.Implicit(solve))
        x = quadratic.minimum(outer["phi"], quadratic.support[0])
        exact = 2 * outer["phi"] + quadratic.B.T @ quadratic.Q @ (x - q)
        return relative_error(mf.hypergrad(meta)(outer, case.episode(0))[0]["phi"], exact)

    assert error(mf.WarmStart(mf.CG(2), u)) < 0.1 * error(mf.CG(4))


def test_adjoint_prepares_the_support_and_works_under_vmap_and_grad():
    case = RIDGE.case()

    def prepare(slow, episode):
        return mf.Episode((2 * episode.support[0], episode.support[1]), episode.query)

    prepared = mf.Problem(RIDGE.inner, RIDGE.outer_loss, case.problem.init, prepare)
    x, y = case.episodes.support
    fast = {"w": torch.zeros(4)}

    def run(problem, x, y):
        return mf.adjoint(problem, case.outer, fast, (x, y), ONE, solve=mf.CG(4))["w"]

    want = torch.stack([run(case.problem, 2 * x[i], y[i]) for i in range(3)])
    got = torch.func.vmap(lambda x, y: run(prepared, x, y))(x, y)
    # The same operations, batched.
    assert_close(got, want, 1e-12)
    # It is a constant, as it says.
    slope = torch.func.grad(lambda x: run(case.problem, x, y[0]).sum())(x[0])
    assert not slope.any()


def test_adjoint_refuses_what_does_not_fit():
    case = RIDGE.case()
    with pytest.raises(mf.errors.ProblemError, match="cotangent has the shapes"):
        mf.adjoint(
            case.problem, case.outer, ONE, case.episode(0).support, {"v": ONE["w"]}, solve=mf.CG(1)
        )


# --- Given ---------------------------------------------------------------------------------------


def by_lbfgs(slow, data):
    w = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = RIDGE.inner({"w": w}, slow, data)
        loss.backward()
        return loss

    optimizer.step(closure)
    return {"w": w}


def by_hand(slow, data):
    w = torch.zeros(4, requires_grad=True)
    for _ in range(200):
        RIDGE.inner({"w": w}, slow, data).backward()
        with torch.no_grad():
            w -= 0.2 * w.grad
        w.grad = None
    return {"w": w}


def by_numpy(slow, data):
    import numpy as np

    x, y = (t.numpy() for t in data)
    gram = x.T @ x / len(x) + np.diag(np.exp(slow["log_l2"].numpy()))
    return {"w": torch.from_numpy(np.linalg.solve(gram, x.T @ y / len(x)))}


OUTSIDE = {"lbfgs": by_lbfgs, "by hand": by_hand, "numpy": by_numpy}


@pytest.mark.parametrize("way", ["backward", "hypergrad", "func.grad", "backward(loop)"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_solution_from_outside_torch(name, way):
    case = RIDGE.case()
    solver = mf.Given(OUTSIDE[name])
    for estimator in (mf.Implicit(mf.CG(4)), mf.Penalty(5.0, SOLVERS["SGD"], central=True)):
        meta = mf.bilevel(case.problem, solver=solver, estimator=estimator)
        # LBFGS stops at a gradient of 1e-12 or where it cannot improve: 1e-8 in the weights.
        tolerance = 1e-7 if name == "lbfgs" else 1e-10
        assert_close(WAYS[way](meta, case), expected(exact_gradients(), way), tolerance)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_solution_from_outside_torch_says_what_vmap_cannot_do(name):
    case = RIDGE.case()
    meta = mf.bilevel(case.problem, solver=mf.Given(OUTSIDE[name]), estimator=mf.Implicit())
    with pytest.raises(mf.errors.TransformError, match=r"Given: .*under vmap.*how=\"loop\""):
        mf.over_tasks(meta)(case.outer, case.episodes)


def test_adapt_with_a_given_solution():
    case = RIDGE.case()
    x, y = case.episode(0).support
    leaf = case.leaves()
    solution = mf.adapt(case.problem, leaf, (x, y), solver=SOLVERS["Given"])
    # The same operations.
    assert torch.equal(solution.params["w"], closed_form(case.outer, (x, y))["w"])
    assert not solution.params["w"].requires_grad
    start = RIDGE.inner(ZERO, case.outer, (x, y))
    assert torch.equal(solution.losses, start.reshape(1))
    batched = torch.func.vmap(
        lambda s: mf.adapt(case.problem, case.outer, s, solver=SOLVERS["Given"]).params["w"]
    )(case.episodes.support)
    assert_close(batched[0], solution.params["w"], 1e-14)


def test_a_given_solution_is_moved_to_the_dtype_of_the_start():
    problem = mf.Problem(
        lambda f, s, x: ((f["w"] - s["c"]) ** 2).sum(),
        lambda f, s, x: f["w"].sum(),
        lambda s, support: {"w": torch.zeros(2, dtype=torch.float32)},
    )
    solver = mf.Given(lambda slow, x: {"w": slow["c"].double()})
    outer = {"c": torch.ones(2, dtype=torch.float32)}
    meta = mf.bilevel(problem, solver=solver, estimator=mf.Implicit())
    grads, (_, aux) = mf.hypergrad(meta)(outer, (None, None))
    assert aux.params["w"].dtype == grads["c"].dtype == torch.float32
    assert grads["c"].tolist() == [1.0, 1.0]


def test_a_given_solution_may_return_its_input():
    problem = mf.Problem(
        lambda f, s, x: ((f["w"] - s["c"]) ** 2).sum(),
        lambda f, s, x: (f["w"] ** 2).sum(),
        lambda s, support: {"w": torch.zeros(2)},
    )
    meta = mf.bilevel(
        problem, solver=mf.Given(lambda slow, x: {"w": slow["c"]}), estimator=mf.Implicit()
    )
    outer = {"c": torch.tensor([1.0, 2.0])}
    grads, (_, aux) = mf.hypergrad(meta)(outer, (None, None))
    assert grads["c"].tolist() == [2.0, 4.0]
    aux.params["w"].zero_()
    assert outer["c"].tolist() == [1.0, 2.0]


def test_given_checks_what_it_is_given():
    case = RIDGE.case()

    def run(solution):
        return mf.adapt(
            case.problem, case.outer, case.episode(0).support, solver=mf.Given(solution)
        )

    with pytest.raises(mf.errors.ProblemError, match="Given: the solution must be a dict"):
        run(lambda slow, data: torch.zeros(4))
    with pytest.raises(mf.errors.ProblemError, match="'v' is on one side only"):
        run(lambda slow, data: {"w": torch.zeros(4), "v": torch.zeros(1)})
    with pytest.raises(mf.errors.ProblemError, match=r"'w' has shape \[3\], init's has \[4\]"):
        run(lambda slow, data: {"w": torch.zeros(3)})
    with pytest.raises(mf.errors.ProblemError, match="int64"):
        run(lambda slow, data: {"w": torch.zeros(4, dtype=torch.int64)})
    with pytest.raises(mf.errors.ProblemError, match="'w' of type list"):
        run(lambda slow, data: {"w": [0.0] * 4})
    with pytest.raises(mf.errors.NonFiniteError, match="'w' is NaN or infinite"):
        run(lambda slow, data: {"w": torch.full((4,), torch.nan)})
    with pytest.raises(RuntimeError, match="size of tensor"):
        # The user's own error outside vmap stays as it is.
        run(lambda slow, data: {"w": torch.zeros(4) + torch.zeros(3)})


@pytest.mark.parametrize(
    "estimator",
    [
        mf.FirstOrder(),
        mf.Unrolled(),
        mf.Unrolled(last=0),
        mf.Unrolled(last=1),
        mf.Unrolled(recompute=True),
        mf.Unrolled(hvp=mf.hvp_finite()),
    ],
    ids=str,
)
def test_unrolled_refuses_a_given_solution(estimator):
    case = RIDGE.case()
    meta = mf.bilevel(case.problem, solver=SOLVERS["Given"], estimator=estimator)
    with pytest.raises(mf.errors.ProblemError, match="no inner steps to differentiate"):
        meta(case.leaves(), case.episode(0))


def test_implicit_warns_about_a_given_solution_that_is_none():
    case = RIDGE.case()
    solver = mf.Given(lambda slow, data: {"w": torch.ones(4)})
    meta = mf.bilevel(case.problem, solver=solver, estimator=mf.Implicit())
    warned = pytest.warns(mf.errors.NotStationaryWarning, match="Implicit: the inner gradient norm")
    with torch.no_grad(), warned:
        meta(case.outer, case.episode(0))


@pytest.mark.parametrize(("left", "warned"), [(0.0098, False), (0.0102, True)])
@pytest.mark.parametrize("name", ["Implicit", "FixedPoint"])
def test_the_warning_begins_at_a_hundredth_of_the_first_residual(name, left, warned):
    """One step of 1 - left on a quadratic of curvature 1 leaves this part of every residual."""
    estimator = {
        "Implicit": mf.Implicit(mf.Dense()),
        "FixedPoint": mf.FixedPoint(
            lambda fast, slow, x: {"w": fast["w"] / 2 + slow["p"] / 2}, mf.Neumann(60, 1.0)
        ),
    }[name]
    problem = mf.Problem(
        lambda fast, slow, x: 0.5 * ((fast["w"] - slow["p"]) ** 2).sum(),
        lambda fast, slow, x: (fast["w"] ** 2).sum(),
        lambda slow, support: {"w": torch.zeros(2)},
    )
    meta = mf.bilevel(problem, solver=mf.SGD(1 - left, 1), estimator=estimator)
    outer, episode = {"p": torch.tensor([1.0, -2.0])}, mf.Episode(None, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mf.hypergrad(meta)(outer, episode)
    assert [w.category for w in caught] == [mf.errors.NotStationaryWarning] * warned


def test_on_the_tape_the_warning_comes_with_the_derivative_and_costs_no_gradient():
    case, calls = RIDGE.case(), []

    def inner(fast, slow, data):
        calls.append(torch.is_grad_enabled())
        return case.problem.inner_loss(fast, slow, data)

    problem = mf.Problem(inner, case.problem.outer_loss, case.problem.init)
    meta = mf.bilevel(problem, solver=SOLVERS["Given"], estimator=mf.Implicit(mf.CG(4)))
    meta(case.leaves(), case.episode(0))[0].backward()  # the first call, with its trial
    calls.clear()
    meta(case.leaves(), case.episode(0))[0].backward()
    # The loss at the start, which is reported, and one linearisation for everything else.
    assert len(calls) == 2

    solver = mf.Given(lambda slow, data: {"w": torch.ones(4)})
    meta = mf.bilevel(case.problem, solver=solver, estimator=mf.Implicit(mf.CG(4)))
    leaves = case.leaves()
    loss, _ = meta(leaves, case.episode(0))  # a warning here would be an error
    with pytest.warns(
        mf.errors.NotStationaryWarning, match="is .* at the solution, .* of its initial"
    ):
        loss.backward()
    twice = mf.hypergrad(meta)
    with pytest.warns(mf.errors.NotStationaryWarning) as caught:
        twice(leaves, case.episode(0))
    assert len(caught) == 1


def by_vmap(meta, case):
    support, query = case.episodes
    grads = torch.func.vmap(
        lambda s, q: torch.func.grad(lambda o: meta(o, mf.Episode(s, q))[0])(case.outer)
    )(support, query)
    return {k: v.mean(0) for k, v in grads.items()}


def over_tasks_on_the_tape(meta, case):
    leaves = case.leaves()
    mf.over_tasks(meta)(leaves, case.episodes)[0].backward()
    return grads_of(leaves)


ONCE = {
    "over_tasks": over_tasks_on_the_tape,
    "func.grad": lambda meta, case: torch.func.grad(
        lambda o: torch.stack([meta(o, case.episode(i))[0] for i in range(case.tasks)]).mean()
    )(case.outer),
    "func.grad of over_tasks": lambda meta, case: torch.func.grad(
        lambda o: mf.over_tasks(meta)(o, case.episodes)[0]
    )(case.outer),
    "vmap of func.grad": by_vmap,
}


@pytest.mark.parametrize("way", ONCE)
def test_inside_transforms_too_the_point_is_linearised_once(way):
    case, asked = RIDGE.case(), []

    def spy(loss, fast, *rest):
        asked.append(len(rest))
        return mf.hvp_reverse(loss, fast, *rest)

    solver, estimator = SOLVERS["Given"], mf.Implicit(mf.CG(8), hvp=spy)
    got = ONCE[way](mf.bilevel(case.problem, solver=solver, estimator=estimator), case)
    # One linearisation serves the linear system and the mixed product.
    assert asked == [1] * (case.tasks if way == "func.grad" else 1)
    want = sum(x["log_l2"] for x in exact_gradients()) / case.tasks
    assert_close(got["log_l2"], want, 1e-10)


@pytest.mark.parametrize("wants", [False, True])
def test_only_what_is_asked_for_is_differentiated(wants):
    case, asked = RIDGE.case(), []

    def spy(loss, fast, *rest):
        asked.append(sum(len(x) for x in rest))
        return mf.hvp_reverse(loss, fast, *rest)

    meta = mf.bilevel(
        case.problem, solver=SOLVERS["Given"], estimator=mf.Implicit(mf.CG(4), hvp=spy)
    )
    support, query = case.episode(0)
    floats = [x.clone().requires_grad_(wants) for x in mf.params.tensors(support)]
    leaves = case.leaves()
    _, rebuild = mf.params.partition(support)
    meta(leaves, (rebuild(floats), query))[0].backward()
    assert max(asked) == len(leaves) + wants * len(floats)
    assert all((x.grad is not None) == wants for x in floats)
    assert_close(grads_of(leaves), exact_gradients()[0], 1e-10)


# --- first derivatives only ----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["backward", "func.grad"])
@pytest.mark.parametrize("solve", [mf.Identity(0.5), mf.CG(16), mf.GMRES(16)], ids=str)
def test_implicit_with_finite_differences_keeps_fused_attention(solve, way):
    episode, solver = attention_episode(), mf.SGD(0.5, 400)
    want = by_plain_attention(mf.Implicit(solve), solver, episode)
    got = by_fused_attention(mf.Implicit(solve, mf.hvp_finite()), solver, episode, way)
    # u^(2/3) = 4e-11 of the third derivative, times a condition number of 27.
    assert_close(got, want, 1e-8)


def test_forward_mode_with_finite_differences_is_exact_through_attention():
    episode, solver, direction = attention_episode(), mf.SGD(0.5, 400), torch.linspace(-1, 1, 4)
    want = by_plain_attention(mf.Implicit(mf.CG(16)), solver, episode)["g"] @ direction
    meta = mf.bilevel(
        attention_problem(attention),
        solver=solver,
        estimator=mf.Implicit(mf.CG(16), mf.hvp_finite()),
    )
    _, got = torch.func.jvp(
        lambda g: meta({"g": g}, episode)[0], (ATTENTION_OUTER["g"],), (direction,)
    )
    # As above.
    assert abs(got - want) < 1e-8 * want.abs()


@pytest.mark.parametrize("way", ["backward", "func.grad"])
def test_darts_keeps_fused_attention(way):
    episode, solver = attention_episode(), mf.SGD(0.2, 5)
    want = by_plain_attention(mf.Unrolled(last=1), solver, episode)
    for eps in (1e-2, 1e-3):
        estimator = mf.Unrolled(last=1, hvp=mf.hvp_finite(eps))
        # The square of the displacement times the third derivative; DARTS takes 0.01.
        assert_close(by_fused_attention(estimator, solver, episode, way), want, 10 * eps**2)


def test_finite_differences_on_the_tape_build_no_graph_of_a_second_derivative(monkeypatch):
    tracked = []
    grad = torch.autograd.grad

    def watched(*args, **kwargs):
        tracked.append(kwargs.get("create_graph", False))
        return grad(*args, **kwargs)

    def refused(*args, **kwargs):
        raise AssertionError("torch.func.grad always builds it")

    case = maml()
    meta = mf.bilevel(
        case.problem,
        solver=mf.SGD(0.05, 3),
        estimator=mf.Unrolled(hvp=mf.hvp_finite()),
    )
    leaves = case.leaves()
    loss, _ = meta(leaves, case.episode(0))
    monkeypatch.setattr(torch.autograd, "grad", watched)
    monkeypatch.setattr(torch.func, "grad", refused)
    loss.backward()
    assert tracked
    assert not any(tracked)


# --- EvoGrad -------------------------------------------------------------------------------------


def evograd_formula(slow, data, query, sigma, copies, temperature, seed):
    """The paper's, on the ridge, from a start of zeros."""
    g = torch.Generator().manual_seed(seed)
    candidates = [sigma * torch.randn(4, generator=g, dtype=F64) for _ in range(copies)]
    fits = torch.stack([RIDGE.inner({"w": w}, slow, data) for w in candidates])
    weights = torch.softmax(-fits / temperature, 0)
    return RIDGE.outer_loss({"w": weights @ torch.stack(candidates)}, slow, query)


@pytest.mark.parametrize("way", ["backward", "hypergrad", "func.grad"])
@pytest.mark.parametrize("copies", [2, 5])
def test_evograd_is_its_formula(copies, way):
    case = RIDGE.case()
    g = torch.Generator()
    estimator = mf.EvoGrad(0.3, copies, 0.7, g)
    meta = mf.bilevel(case.problem, solver=mf.SGD(0.1, 0), estimator=estimator)
    g.manual_seed(5)
    got = WAYS[way](meta, case)
    x, query = case.episode(0)
    want = torch.func.grad(lambda o: evograd_formula(o, x, query, 0.3, copies, 0.7, 5))(case.outer)
    # The same sums.
    assert_close(got, want, 1e-13)


@pytest.mark.parametrize("way", ["vmap(grad)", "grad(vmap)"])
def test_evograd_over_tasks(way):
    case = RIDGE.case()
    meta = mf.bilevel(case.problem, solver=SOLVERS["Given"], estimator=mf.EvoGrad(0.3, 4, 0.7))

    def run():
        torch.manual_seed(3)
        if way == "vmap(grad)":
            one = torch.func.grad(meta, has_aux=True)
            grads, _ = torch.func.vmap(one, (None, 0), randomness="same")(case.outer, case.episodes)
            return {k: v.mean(0) for k, v in grads.items()}
        many = mf.over_tasks(meta, randomness="same")
        return torch.func.grad(lambda o: many(o, case.episodes)[0])(case.outer)

    found = []
    for i in range(case.tasks):
        torch.manual_seed(3)
        found.append(torch.func.grad(lambda o, i=i: meta(o, case.episode(i))[0])(case.outer))
    want = {k: torch.stack([g[k] for g in found]).mean(0) for k in found[0]}
    # The same draws, batched.
    assert_close(run(), want, 1e-12)


def test_evograd_in_the_mean_is_a_step_of_gradient_descent():
    # For small sigma^2 / temperature, fast* - fast = -(sigma^2 / temperature) grad + noise, and
    # its derivative by the slow weights is that of the mixed derivative.
    quadratic = Quadratic()
    case = quadratic.case()
    copies, sigma, temperature = 2000, 0.02, 1.0
    estimator = mf.EvoGrad(sigma, copies, temperature)
    solver = mf.SGD(0.1, 0)
    start = quadratic.start(case.outer, None)
    problem = mf.Problem(quadratic.inner, quadratic.outer_loss, lambda slow, support: start)
    meta = mf.bilevel(problem, solver=solver, estimator=estimator)
    got = mf.hypergrad(meta)(case.outer, case.episode(0))[0]["phi"] - 2 * quadratic.phi
    rate = sigma**2 / temperature
    e = quadratic.A @ quadratic.phi
    moved = e - rate * (quadratic.H @ (e - quadratic.B @ quadratic.phi) - quadratic.support[0])
    want = rate * quadratic.B.T @ quadratic.H @ quadratic.Q @ (moved - quadratic.query[0])
    # 0.06 to 0.07 over four seeds, from the noise and from second order in sigma; 0.95 where
    # sigma^2 / temperature is ten times larger.
    assert relative_error(got, want) < 0.15


def test_evograd_moves_with_its_start_as_first_order_does():
    case = maml()
    g = torch.Generator().manual_seed(0)
    meta = mf.bilevel(case.problem, solver=mf.SGD(0.05, 3), estimator=mf.EvoGrad(1e-9, 2, 1.0, g))
    first = mf.bilevel(case.problem, solver=mf.SGD(0.05, 3), estimator=mf.FirstOrder())
    got, want = (mf.hypergrad(m)(case.outer, case.episode(0))[0] for m in (meta, first))
    # Copies at a distance of 1e-9.
    assert_close(got, want, 1e-7)


def test_evograd_needs_first_derivatives_only():
    meta = mf.bilevel(
        attention_problem(attention), solver=mf.SGD(0.2, 3), estimator=mf.EvoGrad(0.1)
    )
    leaf = {k: v.clone().requires_grad_() for k, v in ATTENTION_OUTER.items()}
    with Kernels() as kernels:
        meta(leaf, attention_episode())[0].backward()
    assert {FORWARD, FORWARD + "_backward"} <= kernels.seen
    assert leaf["g"].grad.isfinite().all()


def test_evograd_refuses():
    for name in ("sigma", "temperature"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            mf.EvoGrad(**{"sigma": 0.1, name: 0.0})
    for bad in (1, True, 2.5):
        with pytest.raises(ValueError, match=f"copies must be an integer >= 2, got {bad!r}"):
            mf.EvoGrad(0.1, bad)


def test_the_loss_of_a_given_solution_is_that_of_the_first_step_of_a_stream():
    problem = mf.Problem(
        lambda fast, slow, x: ((fast["w"] - x) ** 2).sum(),
        lambda fast, slow, x: fast["w"].sum(),
        lambda slow, support: {"w": torch.zeros(2)},
    )
    stream = mf.PerStep(torch.tensor([1.0, 3.0, 5.0]))
    given = mf.Given(lambda slow, support: {"w": torch.ones(2)})
    found = mf.adapt(problem, {"a": torch.ones(1)}, stream, solver=given)
    # 2 * (0 - 1)^2 at the start.
    assert found.losses.tolist() == [2.0]
