"""Linear solvers `x = solve(matvec, b)` on fast weights, with a fixed number of products.

None of them looks at a value on the host, so all work under `vmap` and `torch.compile`; `Dense`
alone raises for a singular matrix, and so looks at it. `CG` and `GMRES` are in `krylov`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metafocus import tree
from metafocus.errors import ProblemError
from metafocus.types import LinearSolver, MatVec, Params


@dataclass(frozen=True)
class Neumann:
    """The first terms of the Neumann series: `x = scale * sum_(j<steps) (I - scale A)^j b`.

    Converges where `|I - scale A| < 1`, that is for positive definite `A` and
    `scale < 2 / max eigenvalue`; the error falls as `|I - scale A|^steps`. Along a singular
    direction `x` is `steps * scale * b`; along one of negative or too large curvature it grows
    as `|1 - scale * eigenvalue|^steps`. With `scale` the inner
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

    def __post_init__(self) -> None:
        check(self.steps, 0.0)
        _positive("scale", self.scale)

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
class Identity:
    """No solve at all: `x = scale * b`, as if `A` were `I / scale`.

    The first term of the Neumann series. In `Implicit` this is the estimate of Luketina et al.
    (arXiv 1511.06727) and the core of SAMA (arXiv 2310.05674); in `FixedPoint`, one-step
    differentiation (arXiv 2305.13768). The outcome is the same for any `A`.

    Args:
        scale: the assumed inverse curvature.

    Example:
        >>> Identity(0.5)(lambda v: v, {"x": torch.tensor([8.0])})["x"]
        tensor([4.])
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _positive("scale", self.scale)

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Scale."""
        return tree.scale(b, self.scale)


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
        _positive("damping", self.damping)

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


@dataclass(frozen=True)
class WarmStart:
    """Start any solver where another solve ended: `x = start + solve(A, b - A start)`.

    Costs one more product. A solver with a fixed number of products gains most where the system
    changes little between two solves: keep `u = mf.adjoint(...)` of the last outer step (as
    AmIGO, arXiv 2111.14580, does). A damped solver damps the correction only. For a singular or
    indefinite `A` the outcome is that of `solve`.

    Args:
        solve: the solver of the correction.
        start: a constant of the shape of `b`.

    Raises:
        ProblemError: at the first call, if `start` does not have the names and shapes of `b`.

    Example:
        >>> again = WarmStart(Neumann(1, scale=0.5), {"x": torch.tensor([7.0])})
        >>> again(lambda v: v, {"x": torch.tensor([8.0])})["x"]
        tensor([7.5000])
    """

    solve: LinearSolver
    start: Params

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Solve for what is missing."""
        got, want = ({k: list(v.shape) for k, v in p.items()} for p in (self.start, b))
        if got != want:
            raise ProblemError(
                f"WarmStart: start has the shapes {got}, the right-hand side {want}. Pass what "
                "mf.adjoint returned for the same problem."
            )
        start = {k: self.start[k].detach() for k in b}
        missing = self.solve(matvec, tree.sub(b, matvec(start)))
        return tree.add(start, missing)


def flattening(like: Params) -> tuple[Callable[[Params], Tensor], Callable[[Tensor], Params]]:
    """Return a function from fast weights of these shapes to one vector, and its inverse."""
    if len(like) == 1:
        ((name, only),) = like.items()
        return lambda v: v[name].reshape(-1), lambda v: {name: v.reshape(only.shape)}
    sizes = [v.numel() for v in like.values()]

    def flat(v: Params) -> Tensor:
        return torch.cat([v[k].reshape(-1) for k in like]) if like else torch.zeros(0)

    def unflat(v: Tensor) -> Params:
        parts = v.split(sizes)
        # Mixed types were promoted to the widest.
        return {k: p.reshape(like[k].shape).to(like[k]) for k, p in zip(like, parts, strict=True)}

    return flat, unflat


def check(steps: int, damping: float, name: str = "steps") -> None:
    """Raise for arguments that no linear solver accepts."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {steps!r}.")
    if not damping >= 0 or math.isinf(damping):
        raise ValueError(f"damping must be {'finite' if damping > 0 else '>= 0'}, got {damping}.")


def _positive(name: str, value: float) -> None:
    if not value > 0 or math.isinf(value):
        raise ValueError(f"{name} must be {'finite' if value > 0 else 'positive'}, got {value}.")
