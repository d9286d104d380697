"""Differentiate the solution of the inner problem by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.grad import pushforward
from metafocus.autodiff.hvp import TapeProduct, check_hvp, evaluated_for, hvp_reverse
from metafocus.autodiff.recompute import recompute
from metafocus.autodiff.safe_operators.swapping import differentiable_twice
from metafocus.checks import function
from metafocus.errors import ProblemError
from metafocus.estimators._adjoint import hessian
from metafocus.estimators.attached import (
    Inner,
    Point,
    System,
    attach,
    gradient_norm,
    need_data,
    warn_if_large,
)
from metafocus.estimators.each_product import EachProduct
from metafocus.estimators.watched import HESSIAN, LINEAR, Watched
from metafocus.linear import CG, Neumann
from metafocus.linear.inverse import inverse
from metafocus.rng import replayed
from metafocus.solvers.descent import refuse_own_rule
from metafocus.streams import is_stream
from metafocus.torch_internals import (
    differentiated_again,
    refuse_nested_forward_mode,
    transforming,
)
from metafocus.types import (
    HVP,
    Estimator,
    InnerLoss,
    LinearSolver,
    Params,
    Solution,
    Solver,
)

EACH_PRODUCT = "each product"


@dataclass(frozen=True)
class Implicit(Estimator):
    """Differentiate as if the inner loop had reached a stationary point of the inner loss.

    `d outer_loss / d outer = direct - M' H^-1 v`, with `v` the derivative of the outer loss by
    the fast weights, `H` the Hessian of the inner loss and `M` its mixed derivative, both at the
    solution. Memory does not grow with the inner steps, and the start does not matter. At a
    point that is not stationary this is an approximation: a warning says so.

    Args:
        solve: how to solve `H x = v`: `CG(steps)`, `GMRES(steps)`, `Neumann(steps, scale)`,
            `Nystrom(rank, damping)`, `Identity(scale)`, `Dense()`, `WarmStart(solve, start)` or
            any function `(matvec, b) -> x`. Its steps leave no graph: higher derivatives solve
            once more.
        hvp: how to multiply with `H` and `M`. The point is linearised once, on the tape and
            inside transforms, and this is used for every product; only a hypergradient that is
            differentiated itself linearises it once more. With `hvp_finite()` no second
            derivative is asked of the inner loss, and fused kernels stay.
        data: where the support is a stream, what the derivative is taken on: a function from the
            stream to data, or `"each product"`. The latter, for `Neumann` only, linearises on the
            data of another step for each product, of the steps after the inner ones (stocBiO,
            arXiv 2010.07962); the last of them is for the mixed product. First derivatives only.

    Raises:
        ValueError: for a `data` that is neither, or `"each product"` with another linear solver.
        ProblemError: if the solver has a weight decay, which moves its fixed point away from the
            minimum of `inner_loss`: put the decay into the loss; if it has a `direction` of its
            own; for a stream without `data`.
        NotStationaryWarning: if the inner gradient at the solution is above 1e-2 of its initial
            norm (outside `vmap` and `torch.compile`, where no value can be looked at). Where
            outer parameters require grad it comes in the backward pass, which has the gradient
            at hand.
        NotConvergedWarning: in the backward pass outside `vmap` and `torch.compile`, if `solve`
            found no finite solution (a singular Hessian, such as that of an inner loss without
            curvature: the hypergradient is then NaN), if the terms of a Neumann series do not get
            smaller, or if the fast weights have a half type that is too narrow for the system.

    Example:
        >>> import metafocus as mf
        >>> def inner(fast, slow, x):
        ...     return ((fast["w"] - slow["c"]) ** 2).sum()
        >>> def outer_loss(fast, slow, x):
        ...     return fast["w"].sum()
        >>> problem = mf.Problem(inner, outer_loss, init=lambda slow, _: {"w": torch.zeros(2)})
        >>> meta = mf.bilevel(problem, solver=mf.SGD(0.5, steps=1), estimator=mf.Implicit())
        >>> mf.hypergrad(meta)({"c": torch.ones(2)}, mf.Episode(None, None))[0]
        {'c': tensor([1., 1.])}

    References:
        Rajeswaran et al., arXiv 1909.04630 (iMAML); Lorraine et al., arXiv 1911.02590.
    """

    explicit = True

    solve: LinearSolver = CG(10)  # noqa: RUF009 - frozen, so it can be shared
    hvp: HVP = hvp_reverse
    data: Callable[[Any], Any] | str | None = None

    def __post_init__(self) -> None:
        function("solve", self.solve, LINEAR, 2)
        check_hvp(self.hvp)
        if isinstance(self.data, str):
            if self.data != EACH_PRODUCT:
                raise ValueError(
                    f"data must be a function from the stream to data, or {EACH_PRODUCT!r}, got "
                    f"{self.data!r}."
                )
            if not isinstance(self.solve, Neumann):
                raise ValueError(
                    f"data={EACH_PRODUCT!r} changes the matrix from product to product, which "
                    f"only Neumann allows, got solve={self.solve}."
                )

    def __repr__(self) -> str:
        hvp = getattr(self.hvp, "__name__", self.hvp)
        data = "" if self.data is None else f", data={self.data!r}"
        return f"Implicit(solve={self.solve}, hvp={hvp}{data})"

    @property
    def twice(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the gradient of the inner loss is differentiated."""
        return not getattr(self.hvp, "first_order", False)

    def __call__(
        self, inner_loss: InnerLoss, solver: Solver, start: Params, outer: Params, support: Any
    ) -> Solution:
        """Solve the inner problem without a graph and attach the implicit derivative."""
        refuse_nested_forward_mode("Implicit")
        refuse_decay("Implicit", solver)
        refuse_own_rule("Implicit", solver)
        need_data("Implicit", support, self.data)
        inner = Inner(inner_loss, solver, start, outer, support)
        if self.data == EACH_PRODUCT:
            name = f"Implicit with data={EACH_PRODUCT!r}"
            if not is_stream(support):
                raise ProblemError(
                    f"data={EACH_PRODUCT!r} takes new data for each product: the support must be "
                    f"a stream, such as mf.Batches, got {type(support).__name__}."
                )
            return attach(EachProduct(inner, name, self.solve, self.hvp))
        return attach(_Stationary(inner, self))


def refuse_decay(name: str, solver: Solver) -> None:
    """Raise if the solver does not aim at the minimum of the inner loss."""
    decay = getattr(solver, "weight_decay", 0)
    if decay:
        raise ProblemError(
            f"{name} needs the minimum of inner_loss; weight_decay={decay} moves the "
            "solver's fixed point away. Set weight_decay=0 and add the decay to inner_loss."
        )


class _Stationary(System):
    """The condition that the inner gradient vanishes."""

    defers = True

    def __init__(self, inner: Inner, settings: Implicit):
        super().__init__(inner, settings.data if callable(settings.data) else None)
        self.solve = settings.solve
        self.hvp = settings.hvp
        # One random draw for all products, or H would be a different matrix each time.
        self.loss = replayed(evaluated_for(self.hvp, self.at_solution), self.inputs)

    def inspect(self, start: Params, point: Point) -> None:
        self.warn(list(start.values()), point, gradient_norm(self.loss, point))

    def warn(self, start: Sequence[Tensor], point: Point, norm: Tensor) -> None:
        before = point._replace(fast=dict(zip(self.names, start, strict=True)))
        warn_if_large(
            "Implicit",
            "inner gradient norm",
            lambda: gradient_norm(self.loss, before),
            norm,
            "Take more inner steps, a larger lr, or use Unrolled.",
        )

    def inverse(self, point: Point, right: Params, solve: LinearSolver) -> Params:
        operator, theta = hessian(self.loss, self.hvp, point)
        return inverse(operator, solve, theta, right)

    def pull(self, point: Point, right: Params, wanted: Sequence[bool]) -> list[Tensor]:
        """Return `-M' H^-1 v`."""
        tensors = pt.tensors((tuple(point), right))
        if differentiated_again(tensors):
            return self._pulled(point, right, wanted, final=False)
        if not torch.is_grad_enabled():
            return self._pulled(point, right, wanted, final=True)
        # torch.func.grad records a graph that nobody asked for. Without one the point is linearised
        # once; should somebody differentiate the result all the same, it is computed again.

        def pulled(at: tuple[Any, ...], right: Params) -> list[Tensor]:
            return self._pulled(Point(*at), right, wanted, final=not torch.is_grad_enabled())

        return recompute(pulled, tuple(point), right)

    def _pulled(
        self, point: Point, right: Params, wanted: Sequence[bool], *, final: bool
    ) -> list[Tensor]:
        """Return `-M' H^-1 v`; if `final`, as a constant, with one linearisation for `H` and `M`.

        Otherwise the system is differentiated as an equation, which linearises it once more.
        """
        at, together = point.floats(wanted)
        gradient, product = self.hvp(lambda f, xs: self.loss(f, *together(xs)), point.fast, at)
        if self.on_tape and not transforming():
            # The gradient that was linearised is the one to look at.
            self.warn(self.inputs[: len(self.names)], point, pt.norm(gradient).detach())
        curvature, mixed = (
            (product.hessian, product.mixed)
            if isinstance(product, TapeProduct)
            else (lambda d: product(d)[0], lambda d: product(d)[1:])
        )
        solve = Watched(self.solve)
        solved = solve(curvature, right) if final else self.inverse(point, right, solve)
        solve.warn("Implicit", "the Hessian", solved, 1.0, HESSIAN)
        return [-g for g in mixed(solved)[0]]

    def push(self, point: Point, along: list[Tensor]) -> Params:
        """Return `-H^-1 M t`."""
        at, together = point.floats()
        # A second derivative also where hvp asks for first ones only.
        loss = differentiable_twice(self.loss)

        def gradient(xs: list[Tensor]) -> Params:
            return torch.func.grad(loss)(point.fast, *together(xs))

        _, mixed = pushforward(gradient, at)
        return pt.scale(self.inverse(point, mixed(along), self.solve), -1.0)
