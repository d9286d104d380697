"""Columns of the matrix and a direct solve: all of them, or a few."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from metafocus.linear.vectors import check, flattening, positive
from metafocus.types import MatVec, Params


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

    def __post_init__(self) -> None:
        check(1, self.damping)

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Materialise and solve."""
        flat, unflat = flattening(b)
        right = flat(b)
        eye = torch.eye(right.numel(), dtype=right.dtype, device=right.device)
        columns = torch.func.vmap(lambda e: flat(matvec(unflat(e))))(eye)
        return unflat(torch.linalg.solve(columns.T + self.damping * eye, right))


@dataclass(frozen=True)
class Nystrom:
    """A closed-form inverse of a low-rank approximation of a symmetric `A`.

    With `C` the columns of `A` at `rank` random places and `W` the rows of `C` at these places,
    `A` is replaced by `C W^-1 C'`, and
    `x = (C W^-1 C' + damping I)^-1 b = (b - C (damping W + C'C)^-1 C'b) / damping`.
    Exact for `A + damping I` if `A` has at most that rank. Where the columns do not reach, `x`
    is `b / damping`. A negative eigenvalue near `-damping` makes `x` large, as it makes the exact
    inverse; a singular `A` is no special case.

    Args:
        rank: number of columns, and of products with `A`, taken one after the other; all of them
            if there are fewer unknowns.
        damping: what `A` is outside the columns.
        seed: which columns; drawn by Python's `random`, so that `vmap` does not mind.

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
        check(self.rank, 0.0, "rank")
        positive("damping", self.damping)

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Take the columns and apply Woodbury's identity."""
        flat, unflat = flattening(b)
        right = flat(b)
        size = right.numel()
        rank = min(self.rank, size)
        if not rank:
            return b
        chosen = sorted(random.Random(self.seed).sample(range(size), rank))
        places = torch.tensor(chosen, device=right.device)
        units = torch.zeros(rank, size, dtype=right.dtype, device=right.device)
        units[torch.arange(rank, device=right.device), places] = 1.0
        # One after the other: memory and kernels of a single product.
        columns = torch.stack([flat(matvec(unflat(unit))) for unit in units], -1)
        square = columns.index_select(-2, places)
        gram = columns.mT @ columns
        # Dependent columns make the small matrix singular; C'b has nothing along its kernel, so
        # a shift of the size of rounding changes nothing else.
        info = torch.finfo(right.dtype)
        shift = rank * info.eps * gram.diagonal(dim1=-2, dim2=-1).sum(-1) + info.tiny
        eye = torch.eye(rank, dtype=right.dtype, device=right.device)
        small = self.damping * (square + square.mT) / 2 + gram + shift * eye
        # solve_ex does not ask the device whether it went well.
        weights, _ = torch.linalg.solve_ex(small, columns.mT @ right)
        return unflat((right - columns @ weights) / self.damping)
