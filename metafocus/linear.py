"""Linear solvers `x = solve(matvec, b)` on fast weights, with a fixed number of products.

None of them looks at a value on the host, so all work under `vmap` and `torch.compile`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metafocus import tree
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

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> CG(2)(lambda v: {"x": A @ v["x"]}, {"x": torch.tensor([2.0, 4.0])})["x"]
        tensor([1., 1.])
    """

    steps: int
    damping: float = 0.0

    def __post_init__(self):
        check(self.steps, self.damping)

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Solve."""
        x, residual, direction = tree.zeros_like(b), b, b
        square = tree.dot(b, b)
        for _ in range(self.steps):
            image = tree.add(matvec(direction), direction, self.damping)
            curvature = tree.dot(direction, image)
            alive = (curvature != 0) & (square > 0)
            step = torch.where(alive, square / torch.where(alive, curvature, 1.0), 0.0)
            x = tree.add(x, direction, step)
            residual = tree.add(residual, image, -step)
            new = tree.dot(residual, residual)
            ratio = torch.where(alive, new / torch.where(alive, square, 1.0), 0.0)
            direction = tree.add(residual, direction, ratio)
            square = new
        return x


@dataclass(frozen=True)
class Neumann:
    """The first terms of the Neumann series: `x = scale * sum_(j<steps) (I - scale A)^j b`.

    Converges where `|I - scale A| < 1`, that is for positive definite `A` and
    `scale < 2 / max eigenvalue`; the error falls as `|I - scale A|^steps`. With `scale` the inner
    learning rate it equals truncation to the last `steps` inner steps taken at the solution
    (Lorraine et al., arXiv 1911.02590).

    Args:
        steps: number of terms; the products with `A` are one fewer.
        scale: step size of the underlying fixed-point iteration.

    Example:
        >>> Neumann(3, scale=0.5)(lambda v: v, {"x": torch.tensor([8.0])})["x"]
        tensor([7.])
    """

    steps: int
    scale: float

    def __post_init__(self):
        check(self.steps, 0.0)
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}.")

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Sum the series."""
        x = tree.scale(b, self.scale)
        for _ in range(self.steps - 1):
            x = tree.add(x, tree.sub(b, matvec(x)), self.scale)
        return x


@dataclass(frozen=True)
class Dense:
    """The whole matrix by `vmap` over unit vectors, and a direct solve: the oracle.

    Costs one product per parameter and memory for the square of their number.

    Args:
        damping: added to the diagonal.

    Raises:
        torch.linalg.LinAlgError: if the matrix is singular.

    Example:
        >>> Dense()(lambda v: {"x": 4 * v["x"]}, {"x": torch.tensor([2.0])})["x"]
        tensor([0.5000])
    """

    damping: float = 0.0

    def __post_init__(self):
        check(1, self.damping)

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Materialise and solve."""
        sizes = [v.numel() for v in b.values()]

        def flat(v: Params) -> torch.Tensor:
            return torch.cat([v[k].reshape(-1) for k in b])

        def unflat(v: torch.Tensor) -> Params:
            parts = v.split(sizes)
            return {k: p.reshape(b[k].shape) for (k, p) in zip(b, parts, strict=True)}

        right = flat(b)
        eye = torch.eye(right.numel(), dtype=right.dtype, device=right.device)
        columns = torch.func.vmap(lambda e: flat(matvec(unflat(e))))(eye)
        return unflat(torch.linalg.solve(columns.T + self.damping * eye, right))


def check(steps: int, damping: float) -> None:
    """Raise for arguments that no linear solver accepts."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}.")
    if not damping >= 0:
        raise ValueError(f"damping must be >= 0, got {damping}.")
