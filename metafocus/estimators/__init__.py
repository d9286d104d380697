"""How the adapted fast weights depend on the outer parameters.

An estimator is `estimator(problem, solver, outer, support) -> Solution`. It never sees the query.
"""

from __future__ import annotations

from typing import Any, Protocol

from metafocus.estimators.evograd import EvoGrad
from metafocus.estimators.fixed_point import FixedPoint, OneStep
from metafocus.estimators.implicit import Implicit, adjoint
from metafocus.estimators.penalty import Penalty
from metafocus.estimators.unrolled import FirstOrder, Unrolled
from metafocus.problem import Problem
from metafocus.types import Params, Solution, Solver


class Estimator(Protocol):
    """The protocol; a plain function conforms.

    An estimator that differentiates through explicit tensors only (a custom Function) says so
    with an attribute `explicit = True`; the engine then refuses closures that it would miss.
    """

    def __call__(self, problem: Problem, solver: Solver, outer: Params, support: Any) -> Solution:
        """Solve the inner problem; return fast weights that carry the chosen derivative."""
        ...


__all__ = [
    "Estimator",
    "EvoGrad",
    "FirstOrder",
    "FixedPoint",
    "Implicit",
    "OneStep",
    "Penalty",
    "Unrolled",
    "adjoint",
]
