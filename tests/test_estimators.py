"""Every estimator under every transform, with every inner optimiser, against oracles."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from problems import (
    F64,
    FAST,
    PULL,
    SOLVERS,
    Quadratic,
    Recipe,
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

import metafocus as mf

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 4

UNROLLED = {
    "FirstOrder": (mf.FirstOrder(), 0),
    "graph": (mf.Unrolled(), None),
    "last=0": (mf.Unrolled(last=0), 0),
    "last=1": (mf.Unrolled(last=1), 1),
    "last=2": (mf.Unrolled(last=2), 2),
    "last=K": (mf.Unrolled(last=STEPS), STEPS),
    "last>K": (mf.Unrolled(last=STEPS + 3), STEPS + 3),
    "recompute": (mf.Unrolled(recompute=True), None),
    "recompute=2": (mf.Unrolled(recompute=2), None),
    "recompute=3": (mf.Unrolled(recompute=3), None),
    "recompute>K": (mf.Unrolled(recompute=STEPS + 5), None),
    "last=2,recompute": (mf.Unrolled(last=2, recompute=True), 2),
    "last=3,recompute=2": (mf.Unrolled(last=3, recompute=2), 3),
    "last=0,recompute": (mf.Unrolled(last=0, recompute=True), 0),
    "forward": (mf.Unrolled(hvp=mf.hvp_forward), None),
    "last=2,forward": (mf.Unrolled(last=2, hvp=mf.hvp_forward), 2),
    "finite": (mf.Unrolled(hvp=mf.hvp_finite()), None),
    "finite(1e-5)": (mf.Unrolled(hvp=mf.hvp_finite(1e-5)), None),
}


def tolerance(name: str) -> float:
    # Exact estimators differ from the naive loop by the order of float64 sums only. Central
    # differences of first derivatives with the best step have u^(2/3) = 4e-11 of the third
    # derivative; Adam divides by small roots and so enlarges both by about a thousand.
    return 1e-6 if name.startswith("finite") else 1e-11


# --- ways to ask for the derivative -----------------------------------------


def by_backward(meta, case):
    leaves = case.leaves()
    meta(leaves, case.episode(0))[0].backward()
    return grads_of(leaves)


def by_hypergrad(meta, case):
    return mf.hypergrad(meta)(case.outer, case.episode(0))[0]


def by_func_grad(meta, case):
    return torch.func.grad(lambda o: meta(o, case.episode(0))[0])(case.outer)


def by_vmap_of_grad(meta, case):
    one = torch.func.grad(meta, has_aux=True)
    grads, _ = torch.func.vmap(one, in_dims=(None, 0))(case.outer, case.episodes)
    return {k: v.mean(0) for k, v in grads.items()}


def by_vmap_of_hypergrad(meta, case):
    grads, _ = torch.func.vmap(mf.hypergrad(meta), in_dims=(None, 0))(case.outer, case.episodes)
    return {k: v.mean(0) for k, v in grads.items()}


def by_grad_of_vmap(meta, case):
    return torch.func.grad(lambda o: mf.over_tasks(meta)(o, case.episodes)[0])(case.outer)


def _backward_over_tasks(meta, case, **options):
    leaves = case.leaves()
    mf.over_tasks(meta, **options)(leaves, case.episodes)[0].backward()
    return grads_of(leaves)


def by_vmap_over_outer(meta, case):
    many = {k: torch.stack([v] * case.tasks) for k, v in case.outer.items()}
    grads, _ = torch.func.vmap(torch.func.grad(meta, has_aux=True))(many, case.episodes)
    return {k: v.mean(0) for k, v in grads.items()}


ONE = {"backward": by_backward, "hypergrad": by_hypergrad, "func.grad": by_func_grad}
MANY = {
    "vmap(grad)": by_vmap_of_grad,
    "vmap(hypergrad)": by_vmap_of_hypergrad,
    "vmap(grad) over outer": by_vmap_over_outer,
    "grad(vmap)": by_grad_of_vmap,
    "backward(vmap)": _backward_over_tasks,
    "backward(chunks)": functools.partial(_backward_over_tasks, chunk_size=2),
    "backward(loop)": functools.partial(_backward_over_tasks, how="loop"),
}
WAYS = {**ONE, **MANY}


# --- unrolled estimators -----------------------------------------


@functools.cache
def naive_gradients(solver: str, last: int | None):
    case = maml()
    found = []
    for i in range(case.tasks):
        leaves = case.leaves()
        naive_meta(
            pulled,
            regression,
            lambda slow: {k: slow[k] for k in FAST},
            leaves,
            case.episode(i),
            SOLVERS[solver],
            STEPS,
            last,
        ).backward()
        found.append(grads_of(leaves))
    return found


def expected(found, way):
    if way in ONE:
        return found[0]
    return {k: torch.stack([g[k] for g in found]).mean(0) for k in found[0]}


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
            pulled, regression, lambda _: start, outer, case.episode(0), recipe, STEPS
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
        lambda slow: {"w": slow["w"]},
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


# --- implicit -----------------------------------------

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
HVPS = {"reverse": mf.hvp_reverse, "forward": mf.hvp_forward, "finite": mf.hvp_finite()}


@pytest.mark.filterwarnings("ignore::metafocus.NotStationaryWarning")
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


def fast_sgd(quadratic: Quadratic, steps: int = 250) -> mf.SGD:
    """Heavy ball with the best settings for condition 100: error (9 / 11)^steps."""
    return mf.SGD(4 / (1 + 10) ** 2, steps, momentum=(9 / 11) ** 2)


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
        quadratic.inner, quadratic.outer_loss, lambda _: quadratic.split(best.clone())
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


# --- derivatives of the hypergradient ----------------------------------------------------------

SECOND = {
    "FirstOrder": mf.FirstOrder(),
    "graph": mf.Unrolled(),
    "last=2": mf.Unrolled(last=2),
    "recompute": mf.Unrolled(recompute=True),
    "recompute=2": mf.Unrolled(recompute=2),
    "forward": mf.Unrolled(hvp=mf.hvp_forward),
    "finite": mf.Unrolled(hvp=mf.hvp_finite()),
    "Implicit(CG)": mf.Implicit(mf.CG(13)),
    "Implicit(CG, forward)": mf.Implicit(mf.CG(13), mf.hvp_forward),
    "Implicit(Dense)": mf.Implicit(mf.Dense()),
    "Implicit(Neumann)": mf.Implicit(mf.Neumann(40, 0.04)),
}
# A truncated hypergradient is the derivative of no function.
EXACT = [name for name in SECOND if name not in ("FirstOrder", "last=2")]


def _vector_problem(name):
    """The meta loss of the network as a function of one vector, for central differences."""
    case = maml()
    pull, solver = PULL, mf.SGD(0.05, 3, momentum=0.5)
    if name.startswith("Implicit"):
        # Converged, for only there does the implicit gradient have the derivative of itself.
        pull, solver = 20.0, mf.SGD(0.05, 150)
    problem = mf.Problem(mf.proximal(regression, pull), regression, case.problem.init)
    meta = mf.bilevel(problem, solver=solver, estimator=SECOND[name])
    names = list(FAST)
    sizes = [case.outer[k].numel() for k in names]

    def loss(vector):
        parts = vector.split(sizes)
        outer = {k: p.reshape(case.outer[k].shape) for k, p in zip(names, parts, strict=True)}
        return meta(outer, case.episode(0))[0]

    return loss, flat({k: case.outer[k] for k in names})


def _tape_grad(loss):
    def grad(x):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    return grad


@pytest.mark.parametrize("name", EXACT)
def test_second_derivatives_are_those_of_the_first(name):
    loss, x = _vector_problem(name)
    direction = torch.randn_like(x)
    want = central_difference(_tape_grad(loss), x, direction)

    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (tape,) = torch.autograd.grad(g @ direction, leaf)
    # Central differences of the first derivative: 1e-16 / 1e-5 of rounding, times the condition.
    # A first derivative that is itself a central difference is noisy at 1e-10, over 1e-5.
    limit = 1e-4 if name == "finite" else 1e-7
    assert_close(tape, want, limit)

    grad = torch.func.grad(loss)
    reverse = torch.func.grad(lambda v: grad(v) @ direction)(x)
    assert_close(reverse, want, limit)
    _, forward = torch.func.jvp(grad, (x,), (direction,))
    assert_close(forward, want, limit)
    transposed = torch.func.grad(lambda v: torch.func.jvp(loss, (v,), (direction,))[1])(x)
    assert_close(transposed, want, limit)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_second_derivative_of_first_order_holds_the_adaptation_constant(mode):
    loss, x = _vector_problem("FirstOrder")
    case = maml()
    solver = mf.SGD(0.05, 3, momentum=0.5)
    adapted = mf.adapt(case.problem, case.outer, case.episode(0).support, solver=solver).params
    sizes = [adapted[k].numel() for k in FAST]

    def query_loss(v):
        parts = zip(FAST, v.split(sizes), strict=True)
        return regression(
            {k: p.reshape(adapted[k].shape) for k, p in parts}, None, case.episode(0).query
        )

    direction = torch.randn_like(x)
    want = torch.func.hessian(query_loss)(flat(adapted)) @ direction
    if mode == "reverse":
        got = torch.func.grad(lambda v: torch.func.grad(loss)(v) @ direction)(x)
    else:
        got = torch.func.jvp(torch.func.grad(loss), (x,), (direction,))[1]
    # The same Hessian by another order of differentiation.
    assert_close(got, want, 1e-12)


def test_second_derivative_of_implicit_where_the_outer_gradient_is_zero():
    problem = mf.Problem(
        lambda fast, slow, x: ((fast["v"] - slow["w"]) ** 2).sum(),
        lambda fast, slow, x: ((fast["v"] - x) ** 2).sum(),
        lambda slow: {"v": torch.zeros(2)},
    )
    meta = mf.bilevel(problem, solver=mf.SGD(0.5, 2), estimator=mf.Implicit(mf.CG(3)))
    w = torch.tensor([1.0, 2.0])
    hessian = torch.func.hessian(lambda v: meta({"w": v}, (torch.zeros(2), w))[0])(w)
    # v* = w, so the meta loss is |w - x|^2.
    assert_close(hessian, 2 * torch.eye(2), 1e-12)


@pytest.mark.parametrize("name", SECOND)
def test_jvp_of_the_meta_loss_is_the_hypergradient_along_the_direction(name):
    loss, x = _vector_problem(name)
    direction = torch.randn_like(x)
    want = torch.func.grad(loss)(x) @ direction
    value, got = torch.func.jvp(loss, (x,), (direction,))
    # Forward mode is exact also where the pullback is a central difference (1e-9).
    assert abs(got - want) <= (1e-7 if name == "finite" else 1e-11) * abs(want)
    assert torch.equal(value, loss(x))
    many = torch.stack([direction, -2 * direction])
    batched = torch.func.vmap(lambda d: torch.func.jvp(loss, (x,), (d,))[1])(many)
    assert_close(batched, torch.stack([got, -2 * got]), 1e-11)


@pytest.mark.parametrize("name", ["graph", "recompute", "Implicit(CG)"])
def test_hessian_of_the_meta_loss(name):
    loss, x = _vector_problem(name)
    hessian = torch.func.hessian(loss)(x)
    columns = torch.stack(
        [central_difference(_tape_grad(loss), x, e) for e in torch.eye(len(x))], dim=1
    )
    # As in the test above.
    assert_close(hessian, columns, 1e-7)
    assert_close(hessian, hessian.T, 1e-9)


def test_second_derivatives_of_implicit_ridge_are_the_closed_form():
    ridge = Ridge()
    case = ridge.case()
    meta = mf.bilevel(
        case.problem,
        solver=mf.SGD(0.2, 150, momentum=0.5),
        estimator=mf.Implicit(mf.CG(4)),
    )
    x = case.outer["log_l2"]
    want = torch.func.jacrev(torch.func.jacrev(lambda v: ridge.meta(v, 0)))(x)

    def loss(v):
        return meta({"log_l2": v}, case.episode(0))[0]

    # Four unknowns, so CG(4) is exact up to rounding times the condition number.
    assert_close(torch.func.hessian(loss)(x), want, 1e-9)
    assert_close(torch.func.jacrev(torch.func.jacrev(loss))(x), want, 1e-9)
    leaf = x.clone().requires_grad_()
    grads, _ = mf.hypergrad(meta)({"log_l2": leaf}, case.episode(0))
    (row,) = torch.autograd.grad(grads["log_l2"][2], leaf)
    assert_close(row, want[2], 1e-9)


@pytest.mark.parametrize("steps", [4, 12, 40])
def test_second_derivatives_survive_more_cg_steps_than_unknowns(steps):
    # After convergence the residual is rounding noise, and CG divides noise by noise.
    ridge = Ridge()
    case = ridge.case()
    meta = mf.bilevel(
        case.problem,
        solver=mf.SGD(0.2, 150, momentum=0.5),
        estimator=mf.Implicit(mf.CG(steps)),
    )
    x = case.outer["log_l2"]
    want = torch.func.jacrev(torch.func.jacrev(lambda v: ridge.meta(v, 0)))(x)
    got = torch.func.hessian(lambda v: meta({"log_l2": v}, case.episode(0))[0])(x)
    assert_close(got, want, 1e-9)


@pytest.mark.parametrize("name", ["recompute", "recompute=2", "forward", "Implicit(CG)"])
def test_nested_forward_mode_is_refused(name):
    loss, x = _vector_problem(name)
    d = torch.ones_like(x)
    with pytest.raises(mf.TransformError, match=r"two nested .*jacfwd\(jacrev\(f\)\)"):
        torch.func.jvp(lambda v: torch.func.jvp(loss, (v,), (d,))[1], (x,), (d,))
    with pytest.raises(mf.TransformError, match="nested"):
        torch.func.jacfwd(torch.func.jacfwd(loss))(x)


@pytest.mark.parametrize("name", ["FirstOrder", "graph", "last=2"])
def test_nested_forward_mode_is_right_on_the_tape(name):
    loss, x = _vector_problem(name)
    d = torch.randn_like(x)
    _, got = torch.func.jvp(lambda v: torch.func.jvp(loss, (v,), (d,))[1], (x,), (d,))
    _, want = torch.func.jvp(torch.func.grad(loss), (x,), (d,))
    # The same number by two orders of differentiation.
    assert abs(got - want @ d) <= 1e-9 * abs(want @ d)


# --- the support and prepare -----------------------------------------


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

    got = torch.func.grad(loss)(x) if way == "func.grad" else _tape_grad(loss)(x)
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

    def init(slow):
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


# --- own parts -----------------------------------------


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

    problem = mf.Problem(inner, outer_loss, lambda _: {"a": torch.zeros(()), "b": torch.zeros(())})
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


@pytest.mark.filterwarnings("ignore::metafocus.NotStationaryWarning")
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
    def frozen(problem, solver, outer, support):
        start = problem.start(outer)
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


# --- randomness and autocast -----------------------------------------


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
        _dropped, lambda fast, slow, x: (fast["w"] * x).sum(), lambda slow: {"w": slow["w"]}
    )
    outer = {"w": torch.linspace(-1, 1, 9)}
    episode = mf.Episode(torch.linspace(0.5, 2, 9), torch.ones(9))

    def run(estimator):
        meta = mf.bilevel(problem, solver=mf.SGD(0.1, 4, momentum=0.5), estimator=estimator)
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


@pytest.mark.filterwarnings("ignore::metafocus.NotStationaryWarning")
@pytest.mark.parametrize("hvp", HVPS)
def test_implicit_uses_one_random_draw_for_all_its_products(hvp):
    problem = mf.Problem(
        lambda fast, slow, x: (
            torch.nn.functional.dropout((fast["w"] - slow["w"]) ** 2, 0.5).sum()
            + (fast["w"] ** 2).sum()
        ),
        lambda fast, slow, x: (fast["w"] * x).sum(),
        lambda slow: {"w": torch.zeros(6)},
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

    problem = mf.Problem(inner, inner, lambda slow: {"w": slow["c"]})
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

    problem = mf.Problem(loss, loss, lambda slow: dict(slow))

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


# --- degenerate and odd sizes -----------------------------------------


ALL = {**{k: v[0] for k, v in UNROLLED.items()}, "Implicit": mf.Implicit()}


@pytest.mark.filterwarnings("ignore::metafocus.NotStationaryWarning")
@pytest.mark.parametrize("way", ["backward", "func.grad", "vmap(grad)", "backward(loop)"])
@pytest.mark.parametrize("name", ALL)
def test_zero_steps_mean_no_adaptation(name, way):
    case = maml()
    meta = mf.bilevel(case.problem, solver=mf.SGD(0.1, 0), estimator=ALL[name])
    got = WAYS[way](meta, case)
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
        lambda slow: {},
    )
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 3), estimator=ALL[name])
    found = [
        torch.func.grad(lambda o, i=i: regression(o, None, case.episode(i).query))(case.outer)
        for i in range(case.tasks)
    ]
    # The same operations.
    assert_close(WAYS[way](meta, case), expected(found, way), 1e-14)
    _value, aux = meta(case.outer, case.episode(0))
    assert aux.params == {}
    assert aux.inner_losses.shape == (0,)


@pytest.mark.parametrize("name", ["graph", "recompute", "Implicit"])
def test_a_meta_loss_inside_a_meta_loss(name):
    # Three levels: the inner loss is itself a meta loss, so everything is derived once more.
    def low(fast, slow, x):
        return ((fast["u"] - slow["w"] * x) ** 2).sum() + 0.1 * (fast["u"] ** 4).sum()

    problem = mf.Problem(
        low, lambda fast, slow, x: ((fast["u"] - 1) ** 2).sum(), lambda _: {"u": torch.zeros(2)}
    )
    x = torch.tensor([0.5, 0.8])
    long = name == "Implicit"

    def top(estimator):
        nested = mf.bilevel(problem, solver=mf.SGD(0.2, 60 if long else 2), estimator=estimator)

        def inner(fast, slow, data):
            return nested({"w": fast["w"]}, (data, data))[0] + 0.05 * (fast["w"] ** 2).sum()

        upper = mf.Problem(inner, lambda f, s, d: (f["w"] ** 2).sum(), lambda slow: dict(slow))
        return mf.bilevel(upper, solver=mf.SGD(0.3, 2), estimator=mf.Unrolled())

    outer = {"w": torch.tensor([0.3, 1.4])}
    want, _ = mf.hypergrad(top(mf.Unrolled()))(outer, (x, x))
    got, _ = mf.hypergrad(top(ALL[name]))(outer, (x, x))
    # Exact for the unrolled; the implicit one has converged to 0.6^60 = 5e-14 and better.
    assert_close(got, want, 1e-9)


def test_float32_and_mixed_shapes_keep_their_dtype():
    def loss(fast, slow, x):
        return (fast["s"] - x.mean()) ** 2 + (fast["m"] ** 2).sum()

    problem = mf.Problem(loss, loss, lambda slow: dict(slow))
    outer = {
        "s": torch.tensor(1.0, dtype=torch.float32),
        "m": torch.ones(2, 0, 3, dtype=torch.float32),
    }
    episode = (torch.ones(2, dtype=torch.float32), torch.zeros(2, dtype=torch.float32))
    for name, estimator in ALL.items():
        for solver in (mf.SGD(0.3, 4, momentum=0.1), mf.Adam(0.3, 4)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", mf.NotStationaryWarning)
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
    assert mf.FirstOrder() == mf.Unrolled(last=0)
    assert repr(mf.Unrolled(hvp=mf.hvp_finite(0.01))) == (
        "Unrolled(last=None, recompute=False, hvp=_Finite(eps=0.01))"
    )


def test_recipe_is_what_it_says():
    # The oracle's own settings reach the solver.
    assert Recipe(momentum=0.3, nesterov=True).solver(2) == mf.SGD(0.05, 2, 0.3, True)
