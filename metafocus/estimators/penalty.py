"""Hypergradients from first derivatives alone: nudge the inner problem, compare the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.grad import value_and_grad
from metafocus.autodiff.safe_operators.swapping import differentiable_once
from metafocus.checks import positive
from metafocus.errors import ProblemError
from metafocus.estimators.attached import (
    Inner,
    Point,
    System,
    attach,
    first_only,
    gradient_norm,
    need_data,
    once,
    warn_if_large,
)
from metafocus.estimators.implicit import refuse_decay
from metafocus.rng import replayed
from metafocus.solvers import Given
from metafocus.solvers.descent import refuse_own_rule, solve_inner
from metafocus.torch_internals import forward_levels, transforming
from metafocus.types import Estimator, InnerLoss, Params, Solution, Solver


@dataclass(frozen=True)
class Penalty(Estimator):
    """The hypergradient as a difference of two gradients of the inner loss.

    With `v` the derivative of the outer loss by the fast weights, `fast` the inner solution and
    `nudged` the minimum of `inner_loss + <v, .> / strength`, reached from `fast`,
    `d outer_loss / d outer = direct + strength (d inner_loss(nudged) - d inner_loss(fast))`,
    both derivatives by the slow weights. As `nudged - fast` is `-H^-1 v / strength` to first
    order, this tends to the implicit hypergradient with a bias `O(1 / strength)`; with `central`
    the inner problem is also nudged the other way,
    `strength / 2 (d inner_loss(nudged+) - d inner_loss(nudged-))`, and the bias is
    `O(1 / strength^2)`. If inner_loss is quadratic in all its arguments there is none.

    First derivatives only: any kernel, the memory of one inner gradient. Two gradients that are
    nearly equal are subtracted, so rounding adds about `strength` times the rounding unit: in
    float32, strengths of 10 to 1000 times `|v|` do well. This is F2SA and ScaleBiO with the
    outer loss in the penalty replaced by its tangent, which is all that an estimator sees.

    A difference sees through `detach()`: where inner_loss detaches something that depends on the
    fast weights (Meta-Weight-Net), the result is another one than on the tape, for any strength.

    Args:
        strength: the larger, the smaller the nudge. It is the size of `v / strength` that
            counts, and in the mean over `n` tasks each task's `v` is `n` times smaller.
        solver: how to reach the nudged solution; None: as the solution itself.
        central: nudge both ways, for twice the time.
        data: where the support is a stream, a function from it to the data that the two
            gradients are compared on.

    Raises:
        ValueError: for a strength that is not positive.
        ProblemError: if the inner solution is `Given` and there is no `solver` to nudge with; if
            a solver has a weight decay: put the decay into the loss; if a solver has a
            `direction` of its own; for a stream without `data`.
        TransformError: for second derivatives and forward mode.
        NotStationaryWarning: if the inner gradient, or in the backward pass the gradient of a
            nudged problem, has not fallen to 1e-2 (outside `vmap` and `torch.compile`).

    Example:
        >>> import metafocus as mf
        >>> def inner(fast, slow, x):
        ...     return ((fast["w"] - slow["c"]) ** 2).sum()
        >>> def outer_loss(fast, slow, x):
        ...     return fast["w"].sum()
        >>> problem = mf.Problem(inner, outer_loss, init=lambda slow, _: {"w": torch.zeros(2)})
        >>> meta = mf.bilevel(problem, solver=mf.SGD(0.5, 1), estimator=mf.Penalty(8.0))
        >>> mf.hypergrad(meta)({"c": torch.ones(2)}, mf.Episode(None, None))[0]
        {'c': tensor([1., 1.])}

    References:
        Kwon et al., arXiv 2301.10945 (F2SA); Pan et al., arXiv 2406.19976 (ScaleBiO); Chen, Li
        et al., arXiv 2509.02937 (F2SA as a finite difference, and its central form).
    """

    explicit = True

    strength: float
    solver: Solver | None = None
    central: bool = False
    data: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        positive("strength", self.strength)

    def __call__(
        self, inner_loss: InnerLoss, solver: Solver, start: Params, outer: Params, support: Any
    ) -> Solution:
        """Solve the inner problem; the nudged ones wait for the backward pass."""
        if forward_levels():
            raise first_only("Penalty")
        nudging = solver if self.solver is None else self.solver
        if isinstance(nudging, Given):
            raise ProblemError(
                "Penalty must solve a nudged inner problem too, and a Given solution knows only "
                "its own. Pass Penalty(strength, solver=mf.SGD(...)) beside mf.Given."
            )
        refuse_decay("Penalty", solver)
        refuse_decay("Penalty", nudging)
        for each in (solver, nudging):
            refuse_own_rule("Penalty", each)
        need_data("Penalty", support, self.data)
        inner = Inner(inner_loss, solver, start, outer, support)
        return attach(_Nudged(inner, self, nudging))


class _Nudged(System):
    """The inner problem pulled a little along a cotangent."""

    def __init__(self, inner: Inner, settings: Penalty, nudging: Solver):
        super().__init__(inner, settings.data)
        self.strength = settings.strength
        self.central = settings.central
        self.nudging = nudging

        # First derivatives, and one random draw for all gradients that are compared.
        self.descended = replayed(differentiable_once(inner.loss), self.inputs)
        self.loss = replayed(differentiable_once(self.at_solution), self.inputs)

    def inspect(self, start: Params, point: Point) -> None:
        warn_if_large(
            "Penalty",
            "inner gradient norm",
            lambda: gradient_norm(self.loss, point._replace(fast=start)),
            gradient_norm(self.loss, point),
            "Take more inner steps or a larger lr.",
        )

    def pull(self, point: Point, right: Params, wanted: Sequence[bool]) -> list[Tensor]:
        """Return `strength (g(nudged) - g(fast))`, which raises if it is derived again."""
        reasons = [*pt.tensors(tuple(point)), *right.values()]
        fixed, right = Point(*pt.detach(tuple(point))), pt.detach(right)
        with torch.no_grad():
            ahead = self.gradients(fixed, right, 1.0, wanted)
            behind = self.gradients(fixed, right, -1.0 if self.central else 0.0, wanted)
            factor = self.strength / 2 if self.central else self.strength
            grads = [factor * (a - b) for a, b in zip(ahead, behind, strict=True)]
        return once("Penalty", grads, reasons)

    def push(self, point: Point, along: list[Tensor]) -> Params:
        """Refuse."""
        raise first_only("Penalty")

    def gradients(
        self, point: Point, right: Params, sign: float, wanted: Sequence[bool]
    ) -> list[Tensor]:
        """Return the gradients by `point.floats(wanted)` at the solution nudged with this sign."""
        fast, push = point.fast, sign / self.strength

        def nudged(f: Params, outer: Params, support: Any) -> Tensor:
            return self.descended(f, outer, support) + push * pt.dot(right, f)

        if sign:
            fast = solve_inner(nudged, self.nudging, fast, point.outer, point.support).params
        at, together = point.floats(wanted)
        leaves = {str(i): x for i, x in enumerate(at)}
        weights = {} if transforming() else {f"fast {k}": x for k, x in fast.items()}

        def loss(xs: Params) -> Tensor:
            f = {k: xs.get(f"fast {k}", x) for k, x in fast.items()}
            return self.loss(f, *together([xs[k] for k in leaves]))

        _, grads = value_and_grad(loss, {**leaves, **weights}, differentiable=False)
        if weights:
            self.warn({k: grads[f"fast {k}"] for k in fast}, right, push)
        return [grads[k] for k in leaves]

    def warn(self, gradient: Params, right: Params, push: float) -> None:
        residual = pt.norm(pt.add(gradient, right, push))
        warn_if_large(
            "Penalty",
            "gradient norm of the nudged inner problem" if push else "inner gradient norm",
            lambda: pt.norm(right) / self.strength,
            residual,
            "Take more steps, a larger lr, a lower strength, or central=True.",
        )
