"""Krylov methods: linear solvers that find the best point they can reach by products with `A`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metafocus.autodiff.guarded import safe_divide, safe_sqrt
from metafocus.linear.vectors import check, flattening
from metafocus.types import MatVec, Params


@dataclass(frozen=True)
class CG:
    """Conjugate gradients on `(A + damping I) x = b` for a symmetric positive definite `A`.

    Exact after as many steps as `A` has distinct eigenvalues; the error in the norm of `A` falls
    at least as `2 ((sqrt(k) - 1) / (sqrt(k) + 1))^steps` for condition number `k`. A direction
    along which the curvature is exactly zero ends the iteration where it is.

    Args:
        steps: number of products with `A`.
        damping: added to the diagonal.

    Raises:
        ValueError: for `steps` below 1, or a damping that is negative or infinite.

    References:
        Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49 (1952).

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> CG(2)(lambda v: {"x": A @ v["x"]}, {"x": torch.tensor([2.0, 4.0])})["x"].round()
        tensor([1., 1.])
    """

    steps: int
    damping: float = 0.0

    def __post_init__(self) -> None:
        check(self.steps, self.damping)

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Solve."""
        # One vector: a few operations a step, however many tensors there are.
        flat, unflat = flattening(b)
        residual = flat(b)
        x, direction = torch.zeros_like(residual), residual
        square = residual.dot(residual)
        # Numbers as tensors: an operator makes one of each Python number at each call.
        zero, infinity = torch.zeros_like(square), torch.full_like(square, torch.inf)
        tiny = torch.full_like(square, torch.finfo(square.dtype).tiny)
        for _ in range(self.steps):
            image = flat(matvec(unflat(direction)))
            if self.damping:
                image = image + self.damping * direction
            curvature = direction.dot(image)
            ended = curvature == zero
            # Divided by infinity a step is 0, and NaN stays NaN.
            step = square / torch.where(ended, infinity, curvature)
            x = torch.addcmul(x, direction, step)
            residual = torch.addcmul(residual, image, step, value=-1)
            new = residual.dot(residual)
            # The smallest normal number changes nothing but 0 / 0, once all squares underflow.
            direction = torch.addcmul(residual, direction, new / (square + tiny))
            # From zero there is no way on: the curvature stays zero.
            direction = torch.where(ended, zero, direction)
            square = new
        return unflat(x)


@dataclass(frozen=True)
class GMRES:
    """Generalised minimal residuals on `(A + damping I) x = b` for any square `A`.

    `x` is the point of the Krylov space `b, A b, ..., A^(steps-1) b` with the smallest residual
    `|b - (A + damping I) x|`: neither symmetry nor definiteness is asked for. The residual never
    grows with `steps` and vanishes at the degree of the minimal polynomial of `A`, for a normal
    `A` the number of its distinct eigenvalues. Once the space is exhausted `x` stays where it
    is. A singular `A` gives a finite `x`: a solution if the space holds one, else the point
    where the residual is smallest. Keeps `steps + 1` vectors.

    Args:
        steps: number of products with `A`.
        damping: added to the diagonal.

    Raises:
        ValueError: for `steps` below 1, or a damping that is negative or infinite.

    References:
        Saad and Schultz, SIAM J. Sci. Stat. Comput. 7 (1986).

    Example:
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> x = GMRES(2)(lambda v: {"x": turn @ v["x"]}, {"x": torch.tensor([1.0, 2.0])})
        >>> torch.allclose(x["x"], torch.tensor([2.0, -1.0]))
        True
    """

    steps: int
    damping: float = 0.0

    def __post_init__(self) -> None:
        check(self.steps, self.damping)

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Build the Krylov basis, rotate its Hessenberg matrix to a triangle, solve."""
        flat, unflat = flattening(b)
        right = flat(b)
        length = safe_sqrt(right @ right)
        basis = [safe_divide(right, length)]
        live = length > 0
        triangle: list[Tensor] = []
        rotations: list[tuple[Tensor, Tensor]] = []
        rest = [length]
        largest = torch.zeros_like(length)
        tiny = 10 * self.steps * torch.finfo(right.dtype).eps
        for _ in range(min(self.steps, max(right.numel(), 1))):
            image = flat(matvec(unflat(basis[-1]))) + self.damping * basis[-1]
            # A dead basis vector is zero; so is its image, unless matvec is not linear.
            image = torch.where(live, image, 0.0)
            size = safe_sqrt(image @ image)
            largest = torch.maximum(largest, size)
            known = torch.stack(basis)
            # Gram-Schmidt twice is orthogonal to rounding.
            first = known @ image
            image = image - first @ known
            second = known @ image
            image = image - second @ known
            column = list((first + second).unbind())
            below = safe_sqrt(image @ image)
            live = live & (below > tiny * largest)
            below = torch.where(live, below, 0.0)
            basis.append(torch.where(live, safe_divide(image, below), 0.0))
            for i, (cosine, sine) in enumerate(rotations):
                upper, lower = column[i], column[i + 1]
                column[i] = cosine * upper + sine * lower
                column[i + 1] = cosine * lower - sine * upper
            pivot = safe_sqrt(column[-1] ** 2 + below**2)
            # No pivot: this vector cannot lower the residual, and is left out.
            used = pivot > tiny * largest
            cosine = torch.where(used, safe_divide(column[-1], pivot), 1.0)
            sine = torch.where(used, safe_divide(below, pivot), 0.0)
            rotations.append((cosine, sine))
            column[-1] = torch.where(used, pivot, 0.0)
            triangle.append(torch.stack(column))
            rest.append(-sine * rest[-1])
            rest[-2] = cosine * rest[-2]
        weights: list[Tensor] = []
        for j in reversed(range(len(triangle))):
            value = rest[j]
            for i, weight in enumerate(reversed(weights)):
                value = value - triangle[j + 1 + i][j] * weight
            weights.append(safe_divide(value, triangle[j][j]))
        return unflat(torch.stack(weights[::-1]) @ torch.stack(basis[: len(weights)]))
