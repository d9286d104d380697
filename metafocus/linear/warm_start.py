"""A solve that begins where another one ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metafocus import params as pt
from metafocus.errors import ProblemError
from metafocus.linear.vectors import posed, relative, unit
from metafocus.types import LinearSolver, MatVec, Params


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
        return self._solved(matvec, b, lambda *args: (self.solve(*args), None))[0]

    def with_residual(self, matvec: MatVec, b: Params) -> tuple[Params, Tensor | None]:
        """Return the solution, and what the solver of the correction says, over the length of `b`.

        None if that solver says nothing.
        """
        watch = getattr(self.solve, "with_residual", lambda *args: (self.solve(*args), None))
        return self._solved(matvec, b, watch)

    def _solved(self, matvec: MatVec, b: Params, solve: Any) -> tuple[Params, Tensor | None]:
        got, want = pt.shapes(self.start), pt.shapes(b)
        if got != want:
            raise ProblemError(
                f"WarmStart: start has the shapes {got}, the right-hand side {want}. Pass what "
                "mf.adjoint returned for the same problem."
            )
        system = posed(matvec, b)
        start = system.flat(self.start).detach().to(system.right.dtype) / system.size
        missing = system.right - system.product(start)
        # In a half type a small remainder would underflow.
        rest = unit(missing)
        correction, residual = solve(matvec, system.unflat(missing / rest))
        if residual is not None:
            residual = residual * relative(missing, system.right)
        return system.solution(start + rest * system.flat(correction)), residual
