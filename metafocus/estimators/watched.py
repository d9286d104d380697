"""Say when the linear system of an implicit estimate was not solved."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from metafocus.errors import NotConvergedWarning
from metafocus.linear import Neumann
from metafocus.torch_internals import transforming
from metafocus.types import LinearSolver, MatVec, Params

HESSIAN = (
    "The Hessian is singular or has negative curvature, or the scale is not below 2 / its largest "
    "eigenvalue. Take a smaller scale, or CG or GMRES."
)
"""What to do where the series of a Hessian diverges."""


class Watched:
    """A linear solver that remembers how its last solve ended. No product is added.

    Args:
        solve: the linear solver.
    """

    def __init__(self, solve: LinearSolver):
        self.solve = solve
        self.last_term: Tensor | None = None

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Solve."""
        # The last term of a series of one is the first, and says nothing.
        if not isinstance(self.solve, Neumann) or self.solve.steps == 1:
            return self.solve(matvec, b)
        x, self.last_term = self.solve.with_last_term(matvec, b)
        return x

    def warn(self, name: str, matrix: str, x: Params, limit: float, remedy: str) -> None:
        """Warn if `x` is not finite, or the last term of a Neumann series is too long.

        Outside transforms only, as it asks the device.

        Args:
            name: the estimator.
            matrix: what `A` is.
            x: the solution.
            limit: how long the last term may be, over the first.
            remedy: what to do about a long one.
        """
        if transforming():
            return
        if not _finite(x):
            message = (
                f"{self.solve} found no finite solution of the linear system: {matrix} is singular "
                "for this right-hand side, or one of them holds NaN or infinity. Add damping to "
                "the linear solver or a ridge to the inner problem."
            )
        elif self.last_term is not None and float(self.last_term) >= limit:
            message = (
                f"the last term of {self.solve} is {float(self.last_term):.2g} of the first; from "
                f"{limit} on the estimate is biased. {remedy}"
            )
        else:
            return
        warnings.warn(f"{name}: {message}", NotConvergedWarning, stacklevel=2)


def _finite(x: Params) -> bool:
    # One pass and one question, unless finite entries have an infinite sum.
    total = float(sum(v.detach().sum() for v in x.values()))
    return math.isfinite(total) or all(bool(v.isfinite().all()) for v in x.values())
