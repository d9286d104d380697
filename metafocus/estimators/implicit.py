"""Differentiate the solution of the inner problem by the implicit function theorem."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import tree
from metafocus.autodiff import replayed, value_and_grad, vjp
from metafocus.composites import differentiable_twice
from metafocus.errors import NotStationaryWarning, ProblemError
from metafocus.hvp import hvp_reverse
from metafocus.levels import refuse_nested_forward_mode, transforming
from metafocus.linear import CG
from metafocus.problem import Problem, detached
from metafocus.solvers import count, descend, stacked
from metafocus.types import HVP, LinearSolver, Params, Solution, Solver

STATIONARY = 1e-2
"""The inner gradient must have fallen to this fraction of its initial norm."""


@dataclass(frozen=True)
class Implicit:
    """Differentiate as if the inner loop had reached a stationary point of the inner loss.

    `d outer_loss / d outer = direct - M' H^-1 v`, with `v` the derivative of the outer loss by
    the fast weights, `H` the Hessian of the inner loss and `M` its mixed derivative, both at the
    solution. Memory does not grow with the inner steps, and the start does not matter. At a
    point that is not stationary this is an approximation: a warning says so.

    Args:
        solve: how to solve `H x = v`: `CG(steps)`, `Neumann(steps, scale)`, `Dense()` or any
            function `(matvec, b) -> x`.
        hvp: how to multiply with `H` and `M`; linearised once, used for every product.

    Raises:
        ProblemError: if the solver has a weight decay, which moves its fixed point away from the
            minimum of `inner_loss`: put the decay into the loss.
        NotStationaryWarning: if the inner gradient at the solution is above 1e-2 of its initial
            norm (outside `vmap` and `torch.compile`, where no value can be looked at).

    References:
        Rajeswaran et al., arXiv 1909.04630 (iMAML); Lorraine et al., arXiv 1911.02590.
    """

    solve: LinearSolver = CG(10)  # noqa: RUF009 - frozen, so it can be shared
    hvp: HVP = hvp_reverse

    @property
    def explicit(self) -> bool:
        """Whether derivatives flow through explicit tensors only."""
        return True

    def __call__(self, problem: Problem, solver: Solver, outer: Params, support: Any) -> Solution:
        """Solve the inner problem without a graph and attach the implicit derivative."""
        refuse_nested_forward_mode("Implicit")
        decay = getattr(solver, "weight_decay", 0)
        if decay:
            raise ProblemError(
                f"Implicit needs the minimum of inner_loss; weight_decay={decay} moves the "
                "solver's fixed point away. Set weight_decay=0 and add the decay to inner_loss."
            )
        start = tree.detach(problem.start(outer))
        system = _System(problem, solver, self.solve, self.hvp, (start, outer, support))
        *fast, losses = _ImplicitSolution.apply(system, *system.inputs)
        return Solution(dict(zip(start, fast, strict=True)), losses.detach())


def gradient_norms(problem: Problem, outer: Params, support: Any, *points: Params) -> list[Tensor]:
    """Return the norm of the inner gradient at each point: how stationary it is."""
    norms = []
    for point in points:
        _, grads = value_and_grad(
            lambda p: problem.inner_loss(p, outer, support), point, differentiable=False
        )
        norms.append(tree.norm(grads))
    return norms


def warn_if_not_stationary(
    problem: Problem, outer: Params, support: Any, start: Params, fast: Params
) -> None:
    """Warn if the inner gradient has not fallen to `STATIONARY` of its initial norm."""
    before, after = gradient_norms(problem, outer, support, start, fast)
    # Below the square root of the rounding unit a ratio of two gradients compares noise.
    floor = torch.finfo(after.dtype).eps ** 0.5
    if after > STATIONARY * before and after > floor:
        warnings.warn(
            f"Implicit: the inner gradient norm is {after:.3g} at the solution, "
            f"{after / before:.2g} of its initial {before:.3g}; above {STATIONARY} the implicit "
            "estimate is biased. Take more inner steps, a larger lr, or use Unrolled.",
            NotStationaryWarning,
            stacklevel=2,
        )


class _System:
    """The stationarity condition of the inner problem, and how to solve with its derivative."""

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        solve: LinearSolver,
        hvp: HVP,
        args: tuple[Params, Params, Any],
    ):
        self.problem = problem
        self.solver = solver
        self.solve = solve
        self.hvp = hvp
        self.names = tuple(args[0])
        self.inputs, self.rebuild = tree.partition(args)
        # One random draw for all products, or H would be a different matrix each time.
        self.loss = replayed(differentiable_twice(problem.inner_loss), self.inputs)

    def solution(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        start, outer, support = self.rebuild(inputs)
        fast, _, losses = descend(
            self.problem.inner_loss,
            self.solver,
            start,
            self.solver.init(start),
            *detached(outer, support),
            range(count(self.solver, start)),
            differentiable=False,
        )
        if not transforming():
            warn_if_not_stationary(self.problem, *detached(outer, support), start, fast)
        # Without a step the solution is the start, and an input may not be an output.
        values = [fast[k].clone() if fast[k] is start[k] else fast[k] for k in self.names]
        return *values, stacked(losses, fast)

    def unpack(self, saved: Sequence[Tensor]) -> tuple[Params, Params, Any]:
        """Return the solution, the outer parameters and the support."""
        _, outer, support = self.rebuild(saved[: len(self.inputs)])
        return dict(zip(self.names, saved[len(self.inputs) :], strict=True)), outer, support

    def inverse(self, fast: Params, outer: Params, support: Any, right: Params) -> Params:
        """Return `H^-1 right` by the linear solver."""
        _, hessian = self.hvp(lambda f: self.loss(f, outer, support), fast)
        solved = self.solve(lambda direction: hessian(direction)[0], right)
        return {k: solved[k] for k in right}

    def pull(
        self, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return `-M' H^-1 v` for the inputs, with `v` the cotangents of the solution."""
        fast, outer, support = self.unpack(saved)
        right = {
            k: torch.zeros_like(x) if v is None else v
            for (k, x), v in zip(fast.items(), cotangents, strict=False)
        }
        adjoint = self.inverse(fast, outer, support, right)
        at, together = tree.partition((outer, support), torch.is_floating_point)
        _, mixed = self.hvp(lambda f, xs: self.loss(f, *together(xs)), fast, at)
        grads = iter(mixed(adjoint)[1])
        rest = saved[len(self.names) : len(self.inputs)]
        found = [-next(grads) if x.is_floating_point() else None for x in rest]
        return [*[None] * len(self.names), *found]

    def push(
        self, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """Return `-H^-1 M t` for the solution, with `t` the tangents of the inputs."""
        fast, outer, support = self.unpack(saved)
        at, together = tree.partition((outer, support), torch.is_floating_point)
        # Not self.inputs: under a transform these belong to a level that is gone.
        inputs = saved[: len(self.inputs)]
        pairs = list(zip(inputs, tangents, strict=True))[len(self.names) :]
        along = [torch.zeros_like(x) if t is None else t for x, t in pairs if x.is_floating_point()]

        def gradient(xs: list[Tensor]) -> Params:
            return torch.func.grad(self.loss)(fast, *together(xs))

        _, transposed = vjp(gradient, at)
        _, mixed = vjp(lambda d: transposed(d)[0], tree.zeros_like(fast))
        (right,) = mixed(along)
        solved = self.inverse(fast, outer, support, right)
        return tuple(-solved[k] for k in self.names)


class _ImplicitSolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(system: _System, *inputs: Tensor) -> tuple[Tensor, ...]:
        return system.solution(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.system = inputs[0]
        ctx.set_materialize_grads(False)
        # The solution is an output and saved as one: that makes second derivatives right.
        saved = (*inputs[1:], *output[:-1])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.like_losses = (output[-1].shape, output[-1].dtype, output[-1].device)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            saved = [x.detach() for x in saved]
        return None, *ctx.system.pull(saved, cotangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        shape, dtype, device = ctx.like_losses
        losses = torch.zeros(shape, dtype=dtype, device=device)
        return *ctx.system.push(ctx.saved_tensors, tangents[1:]), losses
