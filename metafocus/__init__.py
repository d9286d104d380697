"""metafocus: hypergradients of every kind behind one interface, on torch.func.

A bilevel problem + an inner solver + an estimator = one ordinary scalar function of the outer
parameters, whose ordinary derivative is the chosen hypergradient.
"""

from __future__ import annotations

from metafocus import errors, masks, recipes
from metafocus.adapters import LoRA, Placement, all_linear, matching, top_layers
from metafocus.bilevel import MetaLoss, adapt, bilevel, hypergrad
from metafocus.compare import Comparison, compare
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
from metafocus.lm import all_tokens, answer_tokens, context_tokens, lm_loss
from metafocus.masks import MaskPolicy
from metafocus.problem import Problem, proximal
from metafocus.recompute import recompute
from metafocus.solvers import SGD, Adam, clip_global, clip_per_tensor
from metafocus.spans import Spans
from metafocus.tasks import over_tasks
from metafocus.types import Aux, Episode, Params, Solution, Solver

__version__ = "0.1.0"

__all__ = [
    "CG",
    "SGD",
    "Adam",
    "Aux",
    "ClosureError",
    "Comparison",
    "DataError",
    "Dense",
    "Episode",
    "Estimator",
    "FirstOrder",
    "Implicit",
    "LoRA",
    "MaskPolicy",
    "MetaLoss",
    "MetafocusError",
    "Neumann",
    "NonFiniteError",
    "NotStationaryWarning",
    "Params",
    "Placement",
    "PlacementError",
    "Problem",
    "ProblemError",
    "Solution",
    "Solver",
    "Spans",
    "TransformError",
    "Unrolled",
    "adapt",
    "all_linear",
    "all_tokens",
    "answer_tokens",
    "bilevel",
    "clip_global",
    "clip_per_tensor",
    "compare",
    "context_tokens",
    "errors",
    "hvp_finite",
    "hvp_forward",
    "hvp_reverse",
    "hypergrad",
    "lm_loss",
    "masks",
    "matching",
    "over_tasks",
    "proximal",
    "recipes",
    "recompute",
    "top_layers",
]
