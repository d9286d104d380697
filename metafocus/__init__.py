"""metafocus: hypergradients of every kind behind one interface, on torch.func.

A bilevel problem + an inner solver + an estimator = one ordinary scalar function of the outer
parameters, whose ordinary derivative is the chosen hypergradient.
"""

from __future__ import annotations

from metafocus import errors
from metafocus.bilevel import MetaLoss, adapt, bilevel, hypergrad
from metafocus.errors import (
    ClosureError,
    DataError,
    MetafocusError,
    NonFiniteError,
    NotStationaryWarning,
    PlacementError,
    ProblemError,
    TransformError,
)
from metafocus.estimators import Estimator, FirstOrder, Implicit, Unrolled
from metafocus.hvp import hvp_finite, hvp_forward, hvp_reverse
from metafocus.linear import CG, Dense, Neumann
from metafocus.problem import Problem, proximal
from metafocus.recompute import recompute
from metafocus.solvers import SGD, Adam, clip_global, clip_per_tensor
from metafocus.tasks import over_tasks
from metafocus.types import Aux, Episode, Params, Solution, Solver

__version__ = "0.1.0"

__all__ = [
    "CG",
    "SGD",
    "Adam",
    "Aux",
    "ClosureError",
    "DataError",
    "Dense",
    "Episode",
    "Estimator",
    "FirstOrder",
    "Implicit",
    "MetaLoss",
    "MetafocusError",
    "Neumann",
    "NonFiniteError",
    "NotStationaryWarning",
    "Params",
    "PlacementError",
    "Problem",
    "ProblemError",
    "Solution",
    "Solver",
    "TransformError",
    "Unrolled",
    "adapt",
    "bilevel",
    "clip_global",
    "clip_per_tensor",
    "errors",
    "hvp_finite",
    "hvp_forward",
    "hvp_reverse",
    "hypergrad",
    "over_tasks",
    "proximal",
    "recompute",
]
