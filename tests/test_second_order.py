"""Derivatives of hypergradients: second order and forward mode, each estimator against oracles."""

from __future__ import annotations

import pytest
import torch
from problems import (
    FAST,
    PULL,
    Ridge,
    assert_close,
    central_difference,
    flat,
    maml,
    regression,
)
from ways import SECOND, tape_grad

import metafocus as mf

pytestmark = pytest.mark.usefixtures("float64")


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


@pytest.mark.parametrize("name", EXACT)
def test_second_derivatives_are_those_of_the_first(name):
    loss, x = _vector_problem(name)
    direction = torch.randn_like(x)
    want = central_difference(tape_grad(loss), x, direction)

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
        lambda slow, support: {"v": torch.zeros(2)},
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
    with torch.no_grad():
        assert torch.equal(value, loss(x))
    many = torch.stack([direction, -2 * direction])
    batched = torch.func.vmap(lambda d: torch.func.jvp(loss, (x,), (d,))[1])(many)
    assert_close(batched, torch.stack([got, -2 * got]), 1e-11)


@pytest.mark.parametrize("name", ["graph", "recompute", "Implicit(CG)"])
def test_hessian_of_the_meta_loss(name):
    loss, x = _vector_problem(name)
    hessian = torch.func.hessian(loss)(x)
    columns = torch.stack(
        [central_difference(tape_grad(loss), x, e) for e in torch.eye(len(x))], dim=1
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
    with pytest.raises(mf.errors.TransformError, match=r"two nested .*jacfwd\(jacrev\(f\)\)"):
        torch.func.jvp(lambda v: torch.func.jvp(loss, (v,), (d,))[1], (x,), (d,))
    with pytest.raises(mf.errors.TransformError, match="nested"):
        torch.func.jacfwd(torch.func.jacfwd(loss))(x)


@pytest.mark.parametrize("name", ["FirstOrder", "graph", "last=2"])
def test_nested_forward_mode_is_right_on_the_tape(name):
    loss, x = _vector_problem(name)
    d = torch.randn_like(x)
    _, got = torch.func.jvp(lambda v: torch.func.jvp(loss, (v,), (d,))[1], (x,), (d,))
    _, want = torch.func.jvp(torch.func.grad(loss), (x,), (d,))
    # The same number by two orders of differentiation.
    assert abs(got - want @ d) <= 1e-9 * abs(want @ d)
