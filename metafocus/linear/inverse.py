"""A linear solve whose derivatives are linear solves.

Differentiating through the iterations of a solver is wrong where it ends early: conjugate
gradients on a multiple of the identity stop after one step, and the derivative of this step knows
nothing of the other directions. Here `A(theta) x = b` is differentiated as an equation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.grad import pullback, pushforward
from metafocus.torch_internals import unwrap_dead
from metafocus.types import LinearSolver, MatVec, Params


@dataclass(frozen=True)
class Operator:
    """A linear map on fast weights that depends on tensors `theta`, and its transpose."""

    matvec: Callable[[Sequence[Tensor]], MatVec]
    transposed: Callable[[Sequence[Tensor]], MatVec]

    @property
    def T(self) -> Operator:
        """The transposed operator."""
        return Operator(self.transposed, self.matvec)


def inverse(
    operator: Operator, solve: LinearSolver, theta: Sequence[Tensor], right: Params
) -> Params:
    """Return `x = A(theta)^-1 right` as exactly as `solve` does, with no graph of its products.

    `dx = A^-1 (d right - dA x)`, and the pullback of `v` is `w = A^-T v` for `right` and
    `-<w, dA x>` for `theta`, by the same solver. Exact under every transform as far as the
    solver is.
    """
    if not right:
        return right
    spec = _Spec(operator, solve, tuple(right), len(theta))
    solved = _Inverse.apply(spec, *theta, *right.values())
    return dict(zip(right, solved, strict=True))


@dataclass(frozen=True)
class _Spec:
    operator: Operator
    solve: LinearSolver
    names: tuple[str, ...]
    size: int

    def params(self, tensors: Sequence[Tensor]) -> Params:
        return dict(zip(self.names, tensors, strict=True))

    def image(self, solution: Params) -> Callable[..., list[Tensor]]:
        """Return `theta -> A(theta) solution`."""

        def run(*theta: Tensor) -> list[Tensor]:
            image = self.operator.matvec(theta)(solution)
            return [image[k] for k in self.names]

        return run


class _Inverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(spec: _Spec, *inputs: Tensor) -> tuple[Tensor, ...]:
        theta, right = inputs[: spec.size], spec.params(inputs[spec.size :])
        solved = spec.solve(spec.operator.matvec(theta), right)
        # Returning an input as it is would make it an output of the custom Function.
        kept = [solved[k] for k in spec.names]
        return tuple(x.clone() if any(x is y for y in inputs) else x for x in kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec = inputs[0]
        ctx.set_materialize_grads(False)
        saved = (*inputs[1 : 1 + inputs[0].size], *output)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        spec, saved = ctx.spec, unwrap_dead(ctx.saved_tensors)
        theta, solution = saved[: spec.size], spec.params(saved[spec.size :])
        filled = [
            torch.zeros_like(x) if v is None else v
            for x, v in zip(solution.values(), cotangents, strict=True)
        ]
        adjoint = inverse(spec.operator.T, spec.solve, theta, spec.params(filled))
        down = [-adjoint[k] for k in spec.names]
        wanted = ctx.needs_input_grad[1 : 1 + spec.size]
        grads = [None] * spec.size
        if any(wanted):
            grads = pullback(spec.image(solution), theta, down, wanted)
        return None, *grads, *adjoint.values()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        spec, saved = ctx.spec, unwrap_dead(ctx.saved_tensors)
        theta, solution = saved[: spec.size], spec.params(saved[spec.size :])
        moved, right = tangents[1 : 1 + spec.size], tangents[1 + spec.size :]
        total = {
            k: torch.zeros_like(x) if t is None else t
            for (k, x), t in zip(solution.items(), right, strict=True)
        }
        chosen = [
            i for i, t in enumerate(moved) if t is not None and pt.is_differentiable(theta[i])
        ]
        if chosen:

            def image(*xs: Tensor) -> tuple[Tensor, ...]:
                merged = list(theta)
                for i, x in zip(chosen, xs, strict=True):
                    merged[i] = x
                return tuple(spec.image(solution)(*merged))

            _, push = pushforward(image, *(theta[i] for i in chosen))
            total = pt.sub(total, spec.params(push(*(moved[i] for i in chosen))))
        solved = inverse(spec.operator, spec.solve, theta, total)
        return tuple(solved[k] for k in spec.names)
