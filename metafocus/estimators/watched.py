"""Say when the linear system of an implicit estimate was not solved."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor

from metafocus.errors import NotConvergedWarning
from metafocus.linear import Neumann, WarmStart
from metafocus.torch_internals import transforming
from metafocus.types import LinearSolver, MatVec, Params

HESSIAN = (
    "The Hessian is singular or has negative curvature, or the scale is not below 2 / its largest "
    "eigenvalue. Take a smaller scale, or CG or GMRES."
)
"""What to do where the series of a Hessian diverges."""


LINEAR = "(matvec, b) -> x, such as mf.CG(10)"
"""What a linear solver is."""

LOST = 0.05
"""How much of the right-hand side rounding to a half type may have taken."""


class Watched:
    """A linear solver that remembers how its last solve ended.

    No product is added, except for one where the fast weights have a half type.
    """

    def __init__(self, solve: LinearSolver):
        self.solve = solve
        self.residual: Tensor | None = None
        inner = solve
        while isinstance(inner, WarmStart):
            inner = inner.solve
        self.series: bool = isinstance(inner, Neumann)
        # The last term of a series of one is the first, and says nothing.
        self.silent: bool = isinstance(inner, Neumann) and inner.steps == 1

    def __call__(self, matvec: MatVec, b: Params) -> Params:
        """Solve."""
        watch: Any = getattr(self.solve, "with_residual", None)
        if watch is None or self.silent or transforming():
            return self.solve(matvec, b)
        x, self.residual = watch(matvec, b)
        return x

    def warn(self, name: str, matrix: str, x: Params, limit: float, remedy: str) -> None:
        """Warn if `x` is not finite, a Neumann series too slow, or a half type too narrow.

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
        elif self.residual is None or float(self.residual) < (limit if self.series else LOST):
            return
        elif self.series:
            message = (
                f"the last term of {self.solve} is {float(self.residual):.2g} of the first; from "
                f"{limit} on the estimate is biased. {remedy}"
            )
        else:
            message = (
                f"{self.solve} lost {float(self.residual):.2g} of the right-hand side to rounding: "
                f"{matrix} is singular, badly conditioned or indefinite for a half type. Keep the "
                "fast weights in float32, add damping to the linear solver or a ridge to the inner "
                "problem, or use GMRES in place of CG."
            )
        warnings.warn(f"{name}: {message}", NotConvergedWarning, stacklevel=2)


def _finite(x: Params) -> bool:
    # One pass and one question, unless finite entries have an infinite sum.
    total = float(sum(v.detach().sum() for v in x.values()))
    return math.isfinite(total) or all(bool(v.isfinite().all()) for v in x.values())
