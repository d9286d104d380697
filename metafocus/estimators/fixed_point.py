"""Differentiate a fixed point of any contraction by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.grad import leaf_alias, pulled_through, pushforward, vjp
from metafocus.autodiff.safe_operators.swapping import Swapped
from metafocus.checks import function
from metafocus.errors import ClosureError, ProblemError
from metafocus.estimators.attached import (
    STATIONARY,
    Inner,
    Point,
    System,
    attach,
    need_data,
    warn_if_large,
)
from metafocus.estimators.watched import LINEAR, Watched
from metafocus.linear import Identity, Neumann
from metafocus.linear.inverse import Operator, inverse
from metafocus.rng import kept, replayed
from metafocus.streams import is_stream
from metafocus.torch_internals import is_tracked, refuse_nested_forward_mode, transforming
from metafocus.types import (
    Estimator,
    InnerLoss,
    LinearSolver,
    MatVec,
    Params,
    Solution,
    Solver,
)

Step = Callable[[Params, Params, Any], Params]
"""`(fast, slow, support) -> fast`."""


@dataclass(frozen=True)
class FixedPoint(Estimator):
    """Differentiate as if the inner solver had reached `fast = step(fast, slow, support)`.

    `d outer_loss / d outer = direct + u' d step / d slow` with `(I - J') u = v`, `v` the
    derivative of the outer loss by the fast weights and `J = d step / d fast`, both at the
    solution. For what is not the minimum of a loss: deep equilibrium models, proximal and Newton
    steps, alternating or projected methods. The map need not be the one that the inner solver
    iterates, as long as it has the same fixed point.

    Args:
        step: `(fast, slow, support) -> fast`, a function of explicit tensors that returns the
            names and shapes of `fast`. To take a gradient inside, use `torch.func.grad`. It is
            evaluated with operators that can be differentiated twice.
        solve: how to solve the adjoint system, which is not symmetric: `Neumann(k, 1.0)` is `k`
            steps of the adjoint iteration and converges where `step` contracts; `GMRES(k)` needs
            fewer products and no contraction; `Identity()` is one-step differentiation.
        data: where the support is a stream, a function from it to the data that `step` sees.

    Raises:
        ProblemError: if `step` does not return the names and shapes of the fast weights.
            For a stream without `data`.
        ClosureError: if `step` closes over a tensor that requires grad.
        NotStationaryWarning: if `|step(fast) - fast|` at the solution is above 1e-2 of its
            initial value (outside `vmap` and `torch.compile`, where no value can be looked at).
        NotConvergedWarning: in the backward pass outside transforms, if the last term of a
            Neumann series, the default, is above 1e-2 of the first (`step` contracts too slowly
            for it), or `solve` found no finite solution.

    Example:
        >>> import metafocus as mf
        >>> def layer(fast, slow, x):
        ...     return {"z": torch.tanh(slow["a"] * fast["z"] + x)}
        >>> def iterate(slow, x):
        ...     z = {"z": torch.zeros(())}
        ...     for _ in range(40):
        ...         z = layer(z, slow, x)
        ...     return z
        >>> problem = mf.Problem(
        ...     lambda fast, slow, x: (fast["z"] - layer(fast, slow, x)["z"]) ** 2,
        ...     lambda fast, slow, x: fast["z"],
        ...     init=lambda slow, support: {"z": torch.zeros(())})
        >>> meta = mf.bilevel(problem, solver=mf.Given(iterate), estimator=mf.FixedPoint(layer))
        >>> x = torch.tensor(1.0)
        >>> grads, (z, _) = mf.hypergrad(meta)({"a": torch.tensor(0.5)}, mf.Episode(x, x))
        >>> slope = 1 - z**2
        >>> torch.allclose(grads["a"], slope * z / (1 - 0.5 * slope))
        True

    References:
        Bai et al., arXiv 1909.01377 (deep equilibrium models); Grazzi et al., arXiv 2006.16218.
    """

    explicit = True

    step: Step
    solve: LinearSolver = Neumann(20, 1.0)  # noqa: RUF009 - frozen, so it can be shared
    data: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        function("step", self.step, "(fast, slow, support) -> fast", 3)
        function("solve", self.solve, LINEAR, 2)

    def __call__(
        self, inner_loss: InnerLoss, solver: Solver, start: Params, outer: Params, support: Any
    ) -> Solution:
        """Solve the inner problem without a graph and attach the derivative of the fixed point."""
        refuse_nested_forward_mode("FixedPoint")
        need_data(type(self).__name__, support, self.data)
        view = self.data if self.data is not None and is_stream(support) else None
        step = self.step if view is None else lambda f, o, s: self.step(f, o, view(s))
        _refuse_closures(step, *pt.detach((start, outer, support)))
        inner = Inner(inner_loss, solver, start, outer, support)
        return attach(_Fixed(inner, step, self.solve))


@dataclass(frozen=True)
class OneStep(FixedPoint):
    """Differentiate the last step alone: `FixedPoint(step, Identity())`.

    Exact where `step` converges faster than linearly (Newton); for a contraction with factor
    `rho` the relative error is at most `rho`. No linear system at all.

    Args:
        step: as for `FixedPoint`, and so `data`.

    Example:
        >>> OneStep(lambda fast, slow, x: {"z": x + slow["a"]}).solve
        Identity(scale=1.0)

    References:
        Bolte, Pauwels and Vaiter, arXiv 2305.13768.
    """

    solve: LinearSolver = field(default=Identity(), init=False)


def _applied(step: Step, fast: Params, outer: Params, support: Any) -> Params:
    found = step(fast, outer, support)
    if not isinstance(found, dict):
        raise ProblemError(f"step must return a dict of fast weights, got {type(found).__name__}.")
    got, want = pt.shapes(found), pt.shapes(fast)
    if got != want:
        raise ProblemError(f"step must return the shapes of the fast weights {want}, got {got}.")
    return {k: found[k] for k in fast}


def _refuse_closures(step: Step, start: Params, outer: Params, support: Any) -> None:
    with kept(pt.tensors((start, outer))), torch.enable_grad():
        found = _applied(step, start, outer, support)
    if any(is_tracked(x) for x in found.values()):
        raise ClosureError(
            "step closes over a tensor that requires grad and is not in outer: FixedPoint would "
            "treat it as a constant. Pass it in outer, or freeze it with requires_grad_(False)."
        )


def _transposed(step: Callable[[Params], Params], fast: Params) -> MatVec:
    """Return `u -> J' u`, linearised once."""
    if transforming():
        _, pull = vjp(step, fast)
        return lambda u: pull(u)[0]
    track = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {k: leaf_alias(x, track) for k, x in fast.items()}
        image = step(leaves)
    at = list(leaves.values())
    return lambda u: dict(zip(fast, pulled_through(image, u, at, track=track), strict=True))


class _Fixed(System):
    """The condition that the step stays where it is."""

    def __init__(self, inner: Inner, step: Step, solve: LinearSolver):
        super().__init__(inner)
        self.solve = solve

        def run(fast: Params, outer: Params, support: Any) -> Params:
            with Swapped():
                return _applied(step, fast, outer, support)

        # One random draw for all products, or J would be a different matrix each time.
        self.step = replayed(run, self.inputs)

    def inspect(self, start: Params, point: Point) -> None:
        def residual(fast: Params) -> Tensor:
            with torch.enable_grad():
                moved = self.step(fast, point.outer, point.support)
            return pt.norm(pt.sub(moved, fast)).detach()

        before, after = (lambda: residual(start)), residual(point.fast)
        remedy = "Take more inner steps, or bring the solution with mf.Given."
        warn_if_large("FixedPoint", "residual |step(fast) - fast|", before, after, remedy)

    def operator(self, point: Point) -> tuple[Operator, list[Tensor]]:
        """Return `I - J'` as a function of the tensors it depends on, and these."""
        theta, rebuild = pt.partition(tuple(point))

        def adjoint(at: Sequence[Tensor]) -> MatVec:
            fast, outer, support = rebuild(at)
            back = _transposed(lambda f: self.step(f, outer, support), fast)
            return lambda u: pt.sub(u, back(u))

        def tangent(at: Sequence[Tensor]) -> MatVec:
            fast, outer, support = rebuild(at)
            _, push = pushforward(lambda f: self.step(f, outer, support), fast)
            return lambda d: pt.sub(d, push(d))

        return Operator(adjoint, tangent), theta

    def pull(self, point: Point, right: Params, wanted: Sequence[bool]) -> list[Tensor]:
        """Return `(d step / d rest)' (I - J')^-1 v`."""
        operator, theta = self.operator(point)
        solve = Watched(self.solve)
        solved = inverse(operator, solve, theta, right)
        remedy = "step contracts too slowly, if at all: take more terms, or mf.GMRES."
        solve.warn("FixedPoint", "I - d step / d fast", solved, STATIONARY, remedy)
        at, together = point.floats(wanted)
        moved = _transposed(
            lambda xs: self.step(point.fast, *together(list(xs.values()))),
            {str(i): x for i, x in enumerate(at)},
        )
        return list(moved(solved).values())

    def push(self, point: Point, along: list[Tensor]) -> Params:
        """Return `(I - J)^-1 (d step / d rest) t`."""
        at, together = point.floats()
        _, push = pushforward(lambda xs: self.step(point.fast, *together(xs)), at)
        operator, theta = self.operator(point)
        return inverse(operator.T, self.solve, theta, push(along))
