"""The Hessian of the inner loss as an operator, and the adjoint, which solves a system with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.hvp import evaluated_for, hvp_reverse
from metafocus.checks import function
from metafocus.errors import ProblemError
from metafocus.estimators.attached import Point, need_data
from metafocus.estimators.watched import HESSIAN, Watched
from metafocus.linear.inverse import Operator, inverse
from metafocus.problem import Problem, check_params
from metafocus.rng import replayed
from metafocus.types import HVP, Episode, LinearSolver, MatVec, Params


def adjoint(
    problem: Problem,
    outer: Params,
    fast: Params,
    support: Any,
    cotangent: Params,
    *,
    solve: LinearSolver,
    hvp: HVP = hvp_reverse,
) -> Params:
    """Return `u = H^-1 cotangent`, the adjoint that `Implicit` finds on its way, detached.

    With `cotangent` the derivative of the outer loss by the fast weights, the hypergradient is
    `direct - M' u`. Kept from one outer step to the next it starts the next solve:
    `Implicit(WarmStart(CG(2), u))`.

    Args:
        problem: the bilevel problem; its outer loss is not used.
        outer: the outer parameters.
        fast: where the Hessian is taken: the inner solution.
        support: what the inner loss sees, before `prepare`; no stream.
        cotangent: the right-hand side, with the names and shapes of `fast`.
        solve: the linear solver.
        hvp: how to multiply with the Hessian.

    Raises:
        ProblemError: if `cotangent` and `fast` do not have the same names and shapes.

    Example:
        >>> import metafocus as mf
        >>> def inner(fast, slow, x):
        ...     return 2 * ((fast["w"] - slow["c"]) ** 2).sum()
        >>> problem = mf.Problem(inner, inner, init=lambda slow, _: {"w": torch.zeros(2)})
        >>> fast, outer = {"w": torch.ones(2)}, {"c": torch.ones(2)}
        >>> mf.adjoint(problem, outer, fast, None, {"w": torch.ones(2)}, solve=mf.CG(1))
        {'w': tensor([0.2500, 0.2500])}
    """
    function("solve", solve, "(matvec, b) -> x, such as mf.CG(10)", 2)
    check_params(outer, "outer", "outer parameters")
    check_params(fast, "fast", "fast weights")
    check_params(cotangent, "cotangent", "its entries")
    got, want = pt.shapes(cotangent), pt.shapes(fast)
    if got != want:
        raise ProblemError(f"cotangent has the shapes {got}, fast has {want}.")
    outer, fast, support = pt.detach((outer, fast, support))
    support = problem.prepared(outer, Episode(support, support)).support
    need_data("adjoint", support, None)
    point = Point(fast, outer, pt.detach(support))
    loss = replayed(evaluated_for(hvp, problem.inner_loss), pt.tensors(tuple(point)))
    operator, theta = hessian(loss, hvp, point)
    watched = Watched(solve)
    found = inverse(operator, watched, theta, {k: cotangent[k].detach() for k in fast})
    watched.warn("adjoint", "the Hessian", found, 1.0, HESSIAN)
    return pt.detach(found)


def hessian(loss: Callable[..., Tensor], hvp: HVP, point: Point) -> tuple[Operator, list[Tensor]]:
    """Return the Hessian as a function of the tensors it depends on, and these."""
    theta, rebuild = pt.partition(tuple(point))

    def matvec(at: Sequence[Tensor]) -> MatVec:
        fast, outer, support = rebuild(at)
        _, product = hvp(lambda f: loss(f, outer, support), fast)
        return lambda direction: product(direction)[0]

    # Symmetric.
    return Operator(matvec, matvec), theta
