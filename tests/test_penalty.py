"""The penalty estimator: its formula, the order of its bias, and that it is first-order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import F64, Quadratic, Ridge, assert_close, grads_of, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from ways import WAYS, expected, fast_sgd

import metafocus as mf

pytestmark = pytest.mark.usefixtures("float64")

RIDGE = Ridge()
SGD = mf.SGD(0.2, 150, momentum=0.5)


def closed_form(slow, data):
    x, y = data
    gram = x.T @ x / len(x) + torch.diag(slow["log_l2"].exp())
    return {"w": torch.linalg.solve(gram, x.T @ y / len(x))}


def exact(task):
    leaf = RIDGE.case().leaves()
    RIDGE.meta(leaf["log_l2"], task).backward()
    return grads_of(leaf)


def bias(task, strength):
    """The part of second order: with d = -H^-1 v / s, s exp(l) ((w + d)^2 - w^2 - 2 w d)."""
    case = RIDGE.case()
    x, y = case.episode(task).support
    hessian = 2 * (x.T @ x / len(x) + torch.diag(case.outer["log_l2"].exp()))
    w = closed_form(case.outer, (x, y))["w"]
    v = torch.func.grad(lambda w: RIDGE.outer_loss({"w": w}, {}, case.episode(task).query))(w)
    d = torch.linalg.solve(hessian, v) / strength
    return strength * case.outer["log_l2"].exp() * d**2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("central", [False, True])
def test_penalty_on_a_ridge_is_the_closed_form_and_its_known_bias(central, given, way):
    case = RIDGE.case()
    solver = mf.Given(closed_form) if given else SGD
    meta = mf.bilevel(case.problem, solver=solver, estimator=mf.Penalty(20.0, SGD, central=central))
    found = []
    # In the mean over tasks each cotangent is smaller by their number, and so is its bias.
    smaller = case.tasks if way.startswith(("backward(", "grad(vmap)")) else 1
    for i in range(case.tasks):
        # The inner loss is quadratic in the fast weights, so the two-sided bias is none.
        shift = 0.0 if central else bias(i, 20.0) / smaller
        found.append({"log_l2": exact(i)["log_l2"] + shift})
    # Both loops end at rounding, which the strength multiplies by 20.
    assert_close(WAYS[way](meta, case), expected(found, way), 1e-11)


def test_a_problem_that_is_quadratic_in_everything_has_no_bias():
    quadratic = Quadratic()
    case = quadratic.case()
    for central in (False, True):
        meta = mf.bilevel(
            case.problem, solver=fast_sgd(quadratic), estimator=mf.Penalty(0.5, central=central)
        )
        leaves = case.leaves()
        support = case.episode(0).support.clone().requires_grad_()
        meta(leaves, mf.Episode(support, case.episode(0).query))[0].backward()
        x = quadratic.minimum(quadratic.phi, quadratic.support[0])
        v = quadratic.Q @ (x - quadratic.query[0])
        # Rounding times the condition number 100.
        assert_close(leaves["phi"].grad, 2 * quadratic.phi + quadratic.B.T @ v, 1e-11)
        # The support is an explicit input too: d x* / d support = H^-1.
        assert_close(support.grad, torch.linalg.solve(quadratic.H, v), 1e-10)


def quartic(fast, slow, x):
    """Strongly convex, with third and fourth derivatives."""
    return (
        (fast["w"] ** 2 * (1 + slow["a"] ** 2)).sum()
        + 0.3 * (fast["w"] ** 4).sum()
        - ((slow["a"] + x) * fast["w"]).sum()
    )


QUARTIC = mf.Problem(
    quartic,
    lambda fast, slow, q: ((fast["w"] - q) ** 2).sum(),
    lambda slow, support: {"w": torch.zeros(3, dtype=F64)},
)
QUARTIC_OUTER = {"a": torch.tensor([0.3, -0.4, 0.8], dtype=F64)}
QUARTIC_EPISODE = mf.Episode(
    torch.tensor([1.0, 2.0, -1.0], dtype=F64), torch.tensor([0.5, -0.5, 1.5], dtype=F64)
)


@pytest.mark.parametrize("central", [False, True])
def test_the_order_of_the_bias(central):
    solver = mf.SGD(0.1, 120)

    def gradient(estimator):
        meta = mf.bilevel(QUARTIC, solver=solver, estimator=estimator)
        return mf.hypergrad(meta)(QUARTIC_OUTER, QUARTIC_EPISODE)[0]

    want = gradient(mf.Implicit(mf.Dense()))
    strengths = [30.0, 300.0]
    errors = [relative_error(gradient(mf.Penalty(s, central=central)), want) for s in strengths]
    slope = torch.log10(torch.tensor(errors[1] / errors[0])).item()
    # The next term of the series is smaller by 1 / 30 at most: 0.05 of a decade.
    assert abs(slope - (-2 if central else -1)) < 0.05
    assert errors[0] < 0.1


def test_a_direct_derivative_of_the_outer_loss_is_kept():
    problem = mf.Problem(
        lambda fast, slow, x: ((fast["w"] - slow["c"]) ** 2).sum(),
        lambda fast, slow, x: (fast["w"] * slow["c"]).sum(),
        lambda slow, support: {"w": torch.zeros(2)},
    )
    meta = mf.bilevel(problem, solver=mf.SGD(0.25, 60), estimator=mf.Penalty(3.0))
    grads, _ = mf.hypergrad(meta)({"c": torch.tensor([1.0, 3.0])}, (None, None))
    # w* = c, so the meta loss is |c|^2.
    assert_close(grads["c"], torch.tensor([2.0, 6.0]), 1e-13)


# --- first derivatives only ----------------------------------------------------------------------


ANCHOR = torch.linspace(-1, 1, 16, dtype=F64).reshape(4, 4)


def attention(fast, slow, x):
    """A tiny attention layer whose default kernel has no double backward."""
    q = (x @ fast["w"]).reshape(1, 1, 5, 4)
    out = F.scaled_dot_product_attention(q, q, (x * slow["g"]).reshape(1, 1, 5, 4))
    return ((out - 1) ** 2).mean() + 0.2 * ((fast["w"] - ANCHOR) ** 2).sum()


def plain_attention(fast, slow, x):
    q = x @ fast["w"]
    out = (q @ q.T / 2.0).softmax(-1) @ (x * slow["g"])
    return ((out - 1) ** 2).mean() + 0.2 * ((fast["w"] - ANCHOR) ** 2).sum()


def attention_problem(inner):
    return mf.Problem(
        inner,
        lambda fast, slow, x: ((x @ fast["w"]) ** 2).mean(),
        lambda slow, support: {"w": 0.3 * torch.eye(4)},
    )


ATTENTION_OUTER = {"g": torch.tensor([0.5, 1.0, -1.0, 2.0], dtype=F64)}


class Kernels(TorchDispatchMode):
    """Remember the names of the kernels that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


def attention_episode():
    return mf.Episode(torch.randn(5, 4), torch.randn(5, 4))


def by_plain_attention(estimator, solver, episode):
    meta = mf.bilevel(attention_problem(plain_attention), solver=solver, estimator=estimator)
    return torch.func.grad(lambda o: meta(o, episode)[0])(ATTENTION_OUTER)


def by_fused_attention(estimator, solver, episode, way):
    """The hypergradient, and a check that only the fused kernel ran."""
    meta = mf.bilevel(attention_problem(attention), solver=solver, estimator=estimator)
    with Kernels() as kernels:
        if way == "backward":
            leaf = {"g": ATTENTION_OUTER["g"].clone().requires_grad_()}
            meta(leaf, episode)[0].backward()
            got = grads_of(leaf)
        else:
            got = torch.func.grad(lambda o: meta(o, episode)[0])(ATTENTION_OUTER)
    assert {FORWARD, FORWARD + "_backward"} <= kernels.seen
    assert not {name for name in kernels.seen if "softmax" in name}
    return got


@pytest.mark.parametrize("way", ["backward", "func.grad"])
def test_fused_attention_is_never_derived_twice(way):
    episode, solver = attention_episode(), mf.SGD(0.5, 400)
    want = by_plain_attention(mf.Implicit(mf.CG(16)), solver, episode)
    got = by_fused_attention(mf.Penalty(1e3, central=True), solver, episode, way)
    # |v|^2 / 1e6 of the two-sided bias, times a curvature of 1 / 0.14 in the softest direction.
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("central", [False, True])
def test_second_derivatives_are_refused_and_never_zero(central):
    meta = mf.bilevel(QUARTIC, solver=mf.SGD(0.1, 120), estimator=mf.Penalty(9.0, central=central))

    def loss(a):
        return meta({"a": a}, QUARTIC_EPISODE)[0]

    a = QUARTIC_OUTER["a"]
    refused = pytest.raises(
        mf.errors.TransformError, match="Penalty gives first derivatives by reverse"
    )
    leaf = a.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with refused:
        grad.sum().backward()
    gradient = torch.func.grad(loss)
    for outside in (torch.func.jacrev, torch.func.jacfwd):
        with refused:
            outside(gradient)(a)
    with refused:
        torch.func.grad(lambda a: torch.func.grad(loss)(a).sum())(a)
    with refused:
        torch.func.jvp(loss, (a,), (a,))
    # Without the outermost derivative nothing is refused.
    assert gradient(a).isfinite().all()
    with torch.no_grad():
        assert mf.hypergrad(meta)({"a": a}, QUARTIC_EPISODE)[0]["a"].isfinite().all()


# --- warnings and refusals -----------------------------------------------------------------------


def test_what_has_not_converged_is_warned_about():
    case = RIDGE.case()

    def run(first, second, central=False, strength=10.0):
        estimator = mf.Penalty(strength, second, central=central)
        meta = mf.bilevel(case.problem, solver=first, estimator=estimator)
        leaf = case.leaves()
        meta(leaf, case.episode(0))[0].backward()

    short = mf.SGD(0.2, 1)
    with pytest.warns(mf.errors.NotStationaryWarning) as caught:
        run(short, SGD)
    assert "Penalty: the inner gradient norm" in str(caught[0].message)
    with pytest.warns(
        mf.errors.NotStationaryWarning, match="gradient norm of the nudged inner problem"
    ):
        run(SGD, short)
    # Stationary to 1e-2 of its start, but not against a nudge that is as small.
    with pytest.warns(mf.errors.NotStationaryWarning, match="Penalty: the inner gradient norm"):
        run(mf.SGD(0.2, 12, momentum=0.5), SGD, strength=1e4)
    run(SGD, SGD)
    run(SGD, SGD, central=True)


def test_refusals():
    case = RIDGE.case()
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"strength must be positive, got {bad}"):
            mf.Penalty(bad)
    decayed = mf.SGD(0.1, 5, weight_decay=0.1)
    for solver, nudging, text in (
        (mf.Given(closed_form), None, "must solve a nudged inner problem too"),
        (SGD, mf.Given(closed_form), "must solve a nudged inner problem too"),
        (decayed, SGD, "Penalty needs the minimum"),
        (SGD, decayed, "Penalty needs the minimum"),
    ):
        meta = mf.bilevel(case.problem, solver=solver, estimator=mf.Penalty(9.0, nudging))
        with pytest.raises(mf.errors.ProblemError, match=text):
            meta(case.outer, case.episode(0))


def test_dropout_is_the_same_in_both_gradients():
    problem = mf.Problem(
        lambda fast, slow, x: (
            F.dropout((fast["w"] - slow["w"]) ** 2, 0.5).sum() + (fast["w"] ** 2).sum()
        ),
        lambda fast, slow, x: fast["w"].sum(),
        lambda slow, support: {"w": torch.zeros(6)},
    )
    # The two-sided form does not mind that the solution itself has seen other draws.
    estimator = mf.Penalty(2.0, mf.SGD(0.125, 200), central=True)
    meta = mf.bilevel(problem, solver=mf.SGD(0.1, 3), estimator=estimator)
    with pytest.warns(mf.errors.NotStationaryWarning):
        grads, _ = mf.hypergrad(meta)({"w": torch.linspace(1, 2, 6)}, (None, None))
    # An entry is either dropped, H = 2 and M = 0, or doubled, H = 6 and M = -4: 0 or 2/3. No bias
    # on a quadratic, so rounding only.
    assert all(min(abs(g), abs(g - 2 / 3)) < 1e-12 for g in grads["w"].tolist())
    assert 0 < (grads["w"] == 0).sum() < 6
