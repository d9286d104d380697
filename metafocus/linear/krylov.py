"""Krylov methods: linear solvers that find the best point they can reach by products with `A`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from metafocus.autodiff.guarded import safe_divide, safe_sqrt
from metafocus.checks import not_negative, whole
from metafocus.linear.vectors import System, largest, posed, unit
from metafocus.precision import no_autocast
from metafocus.types import MatVec, Params


@dataclass(frozen=True)
class _Krylov(ABC):
    steps: int
    damping: float = 0.0

    def __post_init__(self) -> None:
        whole("steps", self.steps, 1)
        not_negative("damping", self.damping)

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Solve."""
        system = posed(matvec, b)
        return system.solution(self._solved(system)[0])

    def with_residual(self, matvec: MatVec, b: Params) -> tuple[Params, Tensor]:
        """Return the solution, and what rounding has taken of it: see `System.lost`."""
        system = posed(matvec, b)
        x, expected = self._solved(system)
        return system.solution(x), system.lost(x, self.damping, expected)

    @abstractmethod
    def _solved(self, system: System) -> tuple[Tensor, Tensor]:
        """Return the solution for `right`, and the residual to be expected without rounding."""


@dataclass(frozen=True)
class CG(_Krylov):
    """Conjugate gradients on `(A + damping I) x = b` for a symmetric positive definite `A`.

    Exact after as many steps as `A` has distinct eigenvalues; the error in the norm of `A` falls
    at least as `2 ((sqrt(k) - 1) / (sqrt(k) + 1))^steps` for condition number `k`. Once the
    residual is nothing but rounding, `x` stays where it is. A singular `A` with `b` in its range
    gives the solution of least norm. Where there is none (a direction without curvature is left,
    `A = 0` included) `x` is NaN; so it is where `x` grew until its rounding is as large as `b`.
    Negative curvature is not refused, but costs digits: all of them in a half type, where
    `Implicit` warns; use `GMRES`.

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

    def _solved(self, system: System) -> tuple[Tensor, Tensor]:
        # One vector: a few operations a step, however many tensors there are.
        residual = direction = system.right
        x = torch.zeros_like(residual)
        square = residual.dot(residual)
        floor = system.noise**2 * square.clamp(min=1.0)
        # A tensor: an operator makes one of each Python number at each call.
        infinity = torch.full_like(square, torch.inf)
        steps: list[Tensor] = []
        for _ in range(self.steps):
            image = system.product(direction)
            if self.damping:
                image = image + self.damping * direction
            # Divided by infinity a step is 0, and NaN stays NaN. Without curvature it is infinite.
            done = square <= floor
            step = square / torch.where(done, infinity, direction.dot(image))
            steps.append(step)
            x = torch.addcmul(x, direction, step)
            residual = torch.addcmul(residual, image, step, value=-1)
            new = residual.dot(residual)
            direction = torch.addcmul(residual, direction, new / torch.maximum(square, floor))
            square = new
        # Some eigenvalue is at least the reciprocal of the shortest step. So beyond this limit the
        # rounding of A x is as large as b.
        lengths = torch.stack(steps).detach()
        # With negative curvature nothing bounds the error: no residual is one to be expected.
        expected = torch.where(lengths.amin() < 0, 0.0, square.sqrt())
        lengths = lengths.abs()
        limit = torch.where(lengths > 0, lengths, infinity).amin() / torch.finfo(x.dtype).eps
        # An infinite image made a step of 0 and a residual that is NaN: no number is below it.
        solvable = largest(x) <= limit + (square - square)
        return torch.where(solvable, x, torch.nan), expected


@dataclass(frozen=True)
class GMRES(_Krylov):
    """Generalised minimal residuals on `(A + damping I) x = b` for any square `A`.

    `x` is the point of the Krylov space `b, A b, ..., A^(steps-1) b` with the smallest residual
    `|b - (A + damping I) x|`: neither symmetry nor definiteness is asked for. The residual never
    grows with `steps` and vanishes at the degree of the minimal polynomial of `A`, for a normal
    `A` the number of its distinct eigenvalues. Once the space is exhausted `x` stays where it
    is: at a solution, if the space holds one, else (some `b` of a singular `A`, any `b` of
    `A = 0`) `x` is NaN. Keeps `steps + 1` vectors.

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

    def _solved(self, system: System) -> tuple[Tensor, Tensor]:
        # Build the Krylov basis, rotate its Hessenberg matrix to a triangle, solve.
        right, noise = system.right, system.noise
        length = safe_sqrt(right.dot(right))
        basis = [safe_divide(right, length)]
        live = ~(length <= 0)
        triangle: list[Tensor] = []
        rotations: list[tuple[Tensor, Tensor]] = []
        rest = [length]
        scale, highest = torch.ones_like(length), torch.zeros_like(length)
        solvable = torch.ones_like(live)
        for _ in range(min(self.steps, max(right.numel(), 1))):
            image = system.product(basis[-1]) + self.damping * basis[-1]
            if not triangle:
                # A over the largest entry of its first image: its squares are safe too.
                scale = unit(image)
            image = image / scale
            size = safe_sqrt(image.dot(image))
            highest = torch.maximum(highest, size)
            with no_autocast(image.device):
                known = torch.stack(basis)
                # Gram-Schmidt twice is orthogonal to rounding.
                first = known @ image
                image = image - first @ known
                second = known @ image
                image = image - second @ known
            column = list((first + second).unbind())
            below = safe_sqrt(image.dot(image))
            live = live & ~(below <= noise * highest)
            below = torch.where(live, below, 0.0)
            for i, (cosine, sine) in enumerate(rotations):
                upper, lower = column[i], column[i + 1]
                column[i] = cosine * upper + sine * lower
                column[i + 1] = cosine * lower - sine * upper
            pivot = safe_sqrt(column[-1] ** 2 + below**2)
            # Without a pivot this vector cannot lower the residual: the space is exhausted.
            used = ~(pivot <= noise * highest)
            solvable = solvable & (used | (rest[-1].abs() <= noise**0.5 * length))
            cosine = torch.where(used, safe_divide(column[-1], pivot), 1.0)
            sine = torch.where(used, safe_divide(below, pivot), 0.0)
            rotations.append((cosine, sine))
            column[-1] = torch.where(used, pivot, 0.0)
            triangle.append(torch.stack(column))
            rest.append(-sine * rest[-1])
            rest[-2] = cosine * rest[-2]
            # The residual is rounding by now, and further vectors would be made of it.
            live = live & ~(rest[-1].abs() <= noise * length)
            basis.append(torch.where(live, safe_divide(image, below), 0.0))
        weights: list[Tensor] = []
        for j in reversed(range(len(triangle))):
            value = rest[j]
            for i, weight in enumerate(reversed(weights)):
                value = value - triangle[j + 1 + i][j] * weight
            weights.append(safe_divide(value, triangle[j][j]))
        with no_autocast(right.device):
            x = torch.stack(weights[::-1]) @ torch.stack(basis[: len(weights)])
        # As for CG: beyond this limit A x has no correct digit left.
        solvable = solvable & ~(torch.finfo(x.dtype).eps * highest * largest(x) > 1)
        return torch.where(solvable, x / scale, torch.nan), rest[-1].abs()
