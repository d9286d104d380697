"""How the adapted fast weights depend on the outer parameters.

An estimator is `estimator(inner_loss, solver, start, outer, support) -> Solution`. It never sees
the query.
"""

from __future__ import annotations

from metafocus.estimators._adjoint import adjoint
from metafocus.estimators.evograd import EvoGrad
from metafocus.estimators.fixed_point import FixedPoint, OneStep
from metafocus.estimators.implicit import Implicit
from metafocus.estimators.penalty import Penalty
from metafocus.estimators.unrolled import FirstOrder, Unrolled
from metafocus.types import Estimator

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
