"""Every estimator under every transform, with every inner optimiser, against oracles."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import (
    F64,
    FAST,
    SOLVERS,
    Quadratic,
    Ridge,
    assert_close,
    central_difference,
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
    STEPS,
    UNROLLED,
    WAYS,
    expected,
    fast_sgd,
    tolerance,
)

import metafocus as mf

pytestmark = pytest.mark.usefixtures("float64")


# --- unrolled estimators --------------------------------------------------------------------------


@functools.cache
def naive_gradients(solver: str, last: int | None):
    case = maml()
    found = []
    for i in range(case.tasks):
        leaves = case.leaves()
        naive_meta(
            pulled,
            regression,
            lambda slow, support: {k: slow[k] for k in FAST},
            leaves,
            case.episode(i),
            SOLVERS[solver],
            STEPS,
            last,
        ).backward()
        found.append(grads_of(leaves))
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", UNROLLED)
@pytest.mark.parametrize("solver", SOLVERS)
def test_unrolled_equals_a_naive_loop(solver, name, way):
    estimator, last = UNROLLED[name]
    case = maml()
    meta = mf.bilevel(case.problem, solver=SOLVERS[solver].solver(STEPS), estimator=estimator)
    want = expected(naive_gradients(solver, last), way)
    assert_close(WAYS[way](meta, case), want, tolerance(name))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_naive_loop_itself_agrees_with_central_differences(solver):
    case = maml()
    recipe = SOLVERS[solver]
    names = list(case.outer)
    sizes = [case.outer[k].numel() for k in names]

    def meta(vector):
        parts = vector.split(sizes)
        outer = {
            k: p.reshape(case.outer[k].shape).detach().requires_grad_()
            for k, p in zip(names, parts, strict=True)
        }
        start = {k: outer[k] for k in FAST}
        return naive_meta(
            pulled, regression, lambda _, support: start, outer, case.episode(0), recipe, STEPS
        ).detach()

    direction = torch.randn(sum(sizes))
    want = central_difference(meta, flat(case.outer), direction)
    got = flat(naive_gradients(solver, None)[0]) @ direction
    # Central differences: see problems.central_difference; Adam's curvature costs two digits.
    assert abs(got - want) <= 1e-7 * abs(want)


@pytest.mark.parametrize("name", UNROLLED)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_unrolled_equals_matrix_algebra_on_a_quadratic(name, steps):
    estimator, last = UNROLLED[name]
    quadratic = Quadratic()
    case = quadratic.case()
    meta = mf.bilevel(case.problem, solver=mf.SGD(quadratic.lr, steps), estimator=estimator)
    got, (loss, aux) = mf.hypergrad(meta)(case.outer, case.episode(1))
    want = quadratic.unrolled(1, steps, last)
    # On a quadratic central differences have no truncation error: only 1e-16 / 1e-6 of rounding.
    assert_close(got["phi"], want, 1e-7 if name.startswith("finite") else 1e-12)
    x = quadratic.iterate(quadratic.phi, quadratic.support[1], steps)
    assert_close(quadratic.join(aux.params), x, 1e-12)
    assert aux.inner_losses.shape == (steps,)
    assert not loss.requires_grad


def test_first_order_is_the_fomaml_formula():
    case = maml()
    meta = mf.bilevel(case.problem, solver=mf.SGD(0.05, STEPS), estimator=mf.FirstOrder())
    grads, (_, aux) = mf.hypergrad(meta)(case.outer, case.episode(0))
    adapted = {k: v.requires_grad_() for k, v in aux.params.items()}
    want = torch.autograd.grad(
        regression(adapted, None, case.episode(0).query), list(adapted.values())
    )
    for k, g in zip(adapted, want, strict=True):
        # The very same operations.
        assert torch.equal(grads[k], g)
    assert not grads["log_lr"].any()


def test_first_order_keeps_the_direct_derivative_of_the_outer_loss():
    problem = mf.Problem(
        lambda fast, slow, x: ((fast["w"] - slow["c"]) ** 2).sum(),
        lambda fast, slow, x: (fast["w"] * slow["c"]).sum(),
        lambda slow, support: {"w": slow["w"]},
    )
    outer = {"w": torch.tensor([1.0]), "c": torch.tensor([3.0])}
    meta = mf.bilevel(problem, solver=mf.SGD(0.25, 1), estimator=mf.FirstOrder())
    grads, _ = mf.hypergrad(meta)(outer, (torch.zeros(1), torch.zeros(1)))
    # w1 = 1 - 0.25 * 2 * (1 - 3) = 2, and only its own slot and the direct one are derived.
    assert grads["c"].item() == 2.0
    assert grads["w"].item() == 3.0


@pytest.mark.parametrize("name", UNROLLED)
def test_values_and_aux_do_not_depend_on_the_estimator(name):
    case = maml()
    solver = SOLVERS["momentum"].solver(STEPS)
    loss, aux = mf.bilevel(case.problem, solver=solver, estimator=UNROLLED[name][0])(
        case.leaves(), case.episode(0)
    )
    solution = mf.adapt(case.problem, case.outer, case.episode(0).support, solver=solver)
    # The same forward operations: bit-equal.
    assert all(torch.equal(aux.params[k], solution.params[k]) for k in FAST)
    assert torch.equal(aux.inner_losses, solution.losses)
    assert torch.equal(loss.detach(), regression(solution.params, None, case.episode(0).query))
    assert not aux.inner_losses.requires_grad
    assert not any(v.requires_grad for v in aux.params.values())


# --- implicit -------------------------------------------------------------------------------------

SOLVES = {
    "CG": (mf.CG(5), lambda q: torch.linalg.inv(q.H)),
    "CG damped": (
        mf.CG(5, damping=0.7),
        lambda q: torch.linalg.inv(q.H + 0.7 * torch.eye(5, dtype=F64)),
    ),
    "Neumann": (mf.Neumann(7, 0.015), lambda q: q.neumann(7, 0.015)),
    "Dense": (mf.Dense(), lambda q: torch.linalg.inv(q.H)),
    "Dense damped": (
        mf.Dense(damping=0.7),
        lambda q: torch.linalg.inv(q.H + 0.7 * torch.eye(5, dtype=F64)),
    ),
    "own": (lambda matvec, b: {k: 0.5 * v for k, v in b.items()}, lambda q: 0.5 * torch.eye(5)),
}


@pytest.mark.filterwarnings("ignore::metafocus.errors.NotStationaryWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hvp", HVPS)
@pytest.mark.parametrize("solve", SOLVES)
def test_implicit_is_its_formula_at_any_point(solve, hvp, way):
    quadratic = Quadratic()
    case = quadratic.case()
    linear, inverse = SOLVES[solve]
    meta = mf.bilevel(
        case.problem,
        solver=mf.SGD(quadratic.lr, 2),
        estimator=mf.Implicit(linear, HVPS[hvp]),
    )
    found = [{"phi": quadratic.implicit(i, 2, inverse(quadratic))} for i in range(case.tasks)]
    # CG(5) on five unknowns with condition 100 is exact up to 100 * 1e-16 and some; rounding of
    # finite differences 1e-10, enlarged by the condition number 100.
    assert_close(WAYS[way](meta, case), expected(found, way), 1e-6 if hvp == "finite" else 1e-10)


@pytest.mark.parametrize("solve", ["CG", "Dense"])
def test_implicit_at_convergence_is_the_closed_form_and_does_not_warn(solve):
    quadratic = Quadratic()
    case = quadratic.case()
    meta = mf.bilevel(
        case.problem, solver=fast_sgd(quadratic), estimator=mf.Implicit(SOLVES[solve][0])
    )
    leaves = case.leaves()
    leaves["phi"].grad = None
    support = case.episode(0).support.clone().requires_grad_()
    meta(leaves, mf.Episode(support, case.episode(0).query))[0].backward()
    # (9/11)^250 = 1e-22, times a transient of 250 * 100: below rounding times the condition.
    x = quadratic.minimum(quadratic.phi, quadratic.support[0])
    v = quadratic.Q @ (x - quadratic.query[0])
    assert_close(leaves["phi"].grad, 2 * quadratic.phi + quadratic.B.T @ v, 1e-11)
    # The support is an explicit input too: d x* / d support = H^-1.
    assert_close(support.grad, torch.linalg.solve(quadratic.H, v), 1e-10)


@pytest.mark.parametrize("hvp", HVPS)
@pytest.mark.parametrize("way", ["backward", "func.grad", "vmap(grad)", "grad(vmap)"])
def test_implicit_ridge_is_the_closed_form(way, hvp):
    ridge = Ridge()
    case = ridge.case()
    meta = mf.bilevel(
        case.problem,
        solver=mf.SGD(0.2, 150, momentum=0.5),
        estimator=mf.Implicit(mf.CG(4), HVPS[hvp]),
    )
    found = []
    for i in range(case.tasks):
        leaf = case.leaves()
        ridge.meta(leaf["log_l2"], i).backward()
        found.append(grads_of(leaf))
    # The inner loop stops at rounding; finite differences at u^(2/3) = 4e-11 times condition.
    assert_close(WAYS[way](meta, case), expected(found, way), 1e-7 if hvp == "finite" else 1e-11)


def test_implicit_and_a_long_unroll_agree_on_a_network():
    case = maml()
    strong = mf.Problem(mf.proximal(regression, 20.0), regression, case.problem.init)
    solver = mf.SGD(0.05, 200)
    unrolled = mf.bilevel(strong, solver=solver, estimator=mf.Unrolled())
    implicit = mf.bilevel(strong, solver=solver, estimator=mf.Implicit(mf.CG(15)))
    want, _ = mf.hypergrad(unrolled)(case.outer, case.episode(0))
    got, _ = mf.hypergrad(implicit)(case.outer, case.episode(0))
    # Both have converged to rounding: contraction at most |1 - 0.05 * 20| + tails of the net.
    assert_close({k: got[k] for k in FAST}, {k: want[k] for k in FAST}, 1e-9)
    assert not got["log_lr"].any()


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_neumann_is_truncation_at_the_solution(terms):
    quadratic = Quadratic()
    case = quadratic.case()
    best = quadratic.minimum(quadratic.phi, quadratic.support[0])
    problem = mf.Problem(
        quadratic.inner, quadratic.outer_loss, lambda _, support: quadratic.split(best.clone())
    )
    solver = mf.SGD(quadratic.lr, 8)
    truncated = mf.bilevel(problem, solver=solver, estimator=mf.Unrolled(last=terms))
    neumann = mf.bilevel(
        problem, solver=solver, estimator=mf.Implicit(mf.Neumann(terms, quadratic.lr))
    )
    want, _ = mf.hypergrad(truncated)(case.outer, case.episode(0))
    got, _ = mf.hypergrad(neumann)(case.outer, case.episode(0))
    # Equal in exact arithmetic; the loop stays at the minimum up to rounding times condition.
    assert_close(got, want, 1e-11)


def test_implicit_pays_no_attention_to_the_learned_rate():
    case = maml()
    strong = mf.Problem(mf.proximal(regression, 20.0), regression, case.problem.init)
    fixed = mf.SGD(float(case.outer["log_lr"].exp()), 200)
    learned = mf.SGD(lambda o: o["log_lr"].exp(), 200)
    got = [
        mf.hypergrad(mf.bilevel(strong, solver=s, estimator=mf.Implicit(mf.CG(15))))(
            case.outer, case.episode(0)
        )[0]
        for s in (fixed, learned)
    ]
    # The same operations.
    assert relative_error(got[1], got[0]) == 0
