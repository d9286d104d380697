"""The Neumann series, and its first term alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.checks import positive, whole
from metafocus.linear.vectors import posed, relative
from metafocus.types import MatVec, Params


@dataclass(frozen=True)
class Neumann:
    """The first terms of the Neumann series: `x = scale * sum_(j<steps) (I - scale A)^j b`.

    Converges where `|I - scale A| < 1`, that is for positive definite `A` and
    `scale < 2 / max eigenvalue`; the error falls as `|I - scale A|^steps`. Along a singular
    direction `x` is `steps * scale * b`; along one of negative or too large curvature it grows
    as `|1 - scale * eigenvalue|^steps`. With `scale` the inner
    learning rate it equals truncation to the last `steps` inner steps taken at the solution
    (Lorraine et al., arXiv 1911.02590).

    A series that does not converge has a value all the same, that of the truncation, so `x` is
    not made NaN: outside transforms `Implicit` and `FixedPoint` warn from the last term.

    Args:
        steps: number of terms; the products with `A` are one fewer.
        scale: step size of the underlying fixed-point iteration.

    Raises:
        ValueError: for `steps` below 1, or a scale that is not positive and finite.

    Example:
        >>> Neumann(3, scale=0.5)(lambda v: v, {"x": torch.tensor([8.0])})["x"]
        tensor([7.])
    """

    steps: int
    scale: float

    def __post_init__(self) -> None:
        whole("steps", self.steps, 1)
        positive("scale", self.scale)

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Sum the series."""
        return self.with_residual(matvec, b)[0]

    def with_residual(self, matvec: MatVec, b: Params) -> tuple[Params, Tensor]:
        """Return the sum, and the length of its last term over that of the first.

        This is the relative residual of the sum without its last term, and costs no product.
        """
        system = posed(matvec, b)
        right = residual = system.right
        x = self.scale * right
        for _ in range(self.steps - 1):
            residual = right - system.product(x)
            x = torch.add(x, residual, alpha=self.scale)
        return system.solution(x), relative(residual, right)


@dataclass(frozen=True)
class Identity:
    """No solve at all: `x = scale * b`, as if `A` were `I / scale`.

    The first term of the Neumann series. In `Implicit` this is the estimate of Luketina et al.
    (arXiv 1511.06727) and the core of SAMA (arXiv 2310.05674); in `FixedPoint`, one-step
    differentiation (arXiv 2305.13768). `A` is not used, so that NaN in it goes
    unnoticed.

    Args:
        scale: the assumed inverse curvature.

    Raises:
        ValueError: for a scale that is not positive and finite.

    Example:
        >>> Identity(0.5)(lambda v: v, {"x": torch.tensor([8.0])})["x"]
        tensor([4.])
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive("scale", self.scale)

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Scale."""
        return pt.scale(b, self.scale)
