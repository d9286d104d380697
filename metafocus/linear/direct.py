"""Columns of the matrix and a direct solve: all of them, or a few."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from metafocus.checks import not_negative, positive, whole
from metafocus.linear.vectors import System, posed, unit
from metafocus.precision import no_autocast
from metafocus.torch_internals import constant_when_compiled, transforming
from metafocus.types import MatVec, Params


@dataclass(frozen=True)
class Dense:
    """The whole matrix by `vmap` over unit vectors, and a direct solve: the oracle.

    Costs one product per parameter and memory for the square of their number. Under `vmap` and
    `torch.compile`, where no value can be looked at, a singular matrix gives NaN.

    Args:
        damping: added to the diagonal.

    Raises:
        torch.linalg.LinAlgError: if the matrix is singular and can be looked at.

    Example:
        >>> Dense()(lambda v: {"x": 4 * v["x"]}, {"x": torch.tensor([2.0])})["x"]
        tensor([0.5000])
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        not_negative("damping", self.damping)

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Materialise and solve."""
        system = posed(matvec, b)
        return system.solution(self._solved(system))

    def with_residual(self, matvec: MatVec, b: Params) -> tuple[Params, Tensor]:
        """Return the solution, and what rounding has taken of it: see `System.lost`."""
        system = posed(matvec, b)
        x = self._solved(system)
        return system.solution(x), system.lost(x, self.damping, torch.zeros_like(system.size))

    def _solved(self, system: System) -> Tensor:
        right = system.right
        eye = torch.eye(right.numel(), dtype=right.dtype, device=right.device)
        columns = torch.func.vmap(system.product)(eye)
        solve = direct if transforming() else torch.linalg.solve
        with no_autocast(right.device):
            return solve(columns.T + self.damping * eye, right)


@dataclass(frozen=True)
class Nystrom:
    """A closed-form inverse of a low-rank approximation of a symmetric `A`.

    With `C` the columns of `A` at `rank` random places and `W` the rows of `C` at these places,
    `A` is replaced by `C W^-1 C'`, and `x = (C W^-1 C' + damping I)^-1 b`. Exact for
    `A + damping I` if `A` has at most that rank. Where the columns do not reach, `x` is
    `b / damping`. A negative eigenvalue near `-damping` makes `x` large, as it makes the exact
    inverse; a singular `A` is not a special case.

    Args:
        rank: number of columns, and of products with `A`, taken one after the other; all of them
            if there are fewer unknowns.
        damping: what `A` is outside the columns.
        seed: of the choice of columns. Python's `random` draws them, which works under `vmap`.

    Raises:
        ValueError: for a rank below 1, or a damping that is not positive and finite.

    References:
        Hataya and Yamada, arXiv 2302.09726.

    Example:
        >>> v = torch.tensor([1.0, 2.0, 2.0])
        >>> x = Nystrom(1, damping=1.0)(lambda d: {"x": v * (v @ d["x"])}, {"x": v})
        >>> torch.allclose(x["x"], v / 10)
        True
    """

    rank: int
    damping: float
    seed: int = 0

    def __post_init__(self) -> None:
        whole("rank", self.rank, 1)
        positive("damping", self.damping)

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Take the columns, and solve in an orthonormal basis of their span."""
        system = posed(matvec, b)
        right, size = system.right, system.right.numel()
        rank = min(self.rank, size)
        if not rank:
            return b
        places = torch.tensor(_chosen(self.seed, size, rank), device=right.device)
        units = torch.zeros(rank, size, dtype=right.dtype, device=right.device)
        units[torch.arange(rank, device=right.device), places] = 1.0
        # One after the other: memory and kernels of a single product.
        columns = torch.stack([system.product(one) for one in units], -1)
        with no_autocast(right.device):
            return system.solution(self._solved(columns, places, right))

    def _solved(self, columns: Tensor, places: Tensor, right: Tensor) -> Tensor:
        rank, eps = len(places), torch.finfo(right.dtype).eps
        scale = unit(columns)
        columns, damping = columns / scale, self.damping / scale
        square = columns.index_select(-2, places)
        basis, triangle = torch.linalg.qr(columns)
        inside = basis.mT @ right
        outside = torch.zeros_like(right)
        if rank < len(right):
            outside = right - basis @ inside
            # Twice: divided by the damping, rounding along the basis would be large.
            outside = outside - basis @ (basis.mT @ outside)
        # With x = basis p + outside / damping and w = W^-1 C' x this is linear in (p, w), where
        # W is not inverted and no product is squared. Columns that depend on each other leave w
        # undetermined and p as it is; the shift, of the size of rounding, then chooses w.
        eye = torch.eye(rank, dtype=right.dtype, device=right.device)
        shifted = (square + square.mT) / 2 + rank * eps * eye
        upper = torch.cat([damping * eye, triangle], -1)
        lower = torch.cat([triangle.mT, -shifted], -1)
        both = direct(torch.cat([upper, lower], -2), torch.cat([inside, torch.zeros_like(inside)]))
        return (basis @ both[:rank] + outside / damping) / scale


@constant_when_compiled
def _chosen(seed: int, size: int, rank: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(size), rank))


def direct(matrix: Tensor, right: Tensor) -> Tensor:
    """Return the solution of a square system, NaN where the matrix is singular.

    The device is not asked whether it went well.
    """
    found, info = torch.linalg.solve_ex(matrix, right)
    return torch.where(info == 0, found, torch.nan)
