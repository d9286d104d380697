"""metafocus: hypergradients of every kind behind one interface, on torch.func.

A bilevel problem + an inner solver + an estimator = one ordinary scalar function of the outer
parameters, whose ordinary derivative is the chosen hypergradient.
"""

from __future__ import annotations

from metafocus import attention, diagnostics, errors, masks, recipes, single_loop
from metafocus.adapters import FullWeights, LoRA, Placement, all_linear, matching, top_layers
from metafocus.autodiff.hvp import hvp_finite, hvp_forward, hvp_reverse
from metafocus.autodiff.recompute import recompute
from metafocus.bilevel import MetaLoss, adapt, bilevel, hypergrad
from metafocus.compare import compare
from metafocus.comparison import Comparison
from metafocus.compiled import compiled
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
from metafocus.estimators import (
    Estimator,
    EvoGrad,
    FirstOrder,
    FixedPoint,
    Implicit,
    OneStep,
    Penalty,
    Unrolled,
    adjoint,
)
from metafocus.evolution import evolution
from metafocus.linear import CG, GMRES, Dense, Identity, Neumann, Nystrom, WarmStart
from metafocus.lm import all_tokens, answer_tokens, context_tokens, lm_loss
from metafocus.masks import MaskPolicy
from metafocus.pes import PES, ESSingle
from metafocus.problem import Problem, proximal
from metafocus.single_loop import BOME, F2SA, SABA, SOBA, AmIGO, StocBiO
from metafocus.solvers import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Given,
    Muon,
    RMSprop,
    clip_global,
    clip_per_tensor,
    per_step,
)
from metafocus.spans import Spans
from metafocus.tasks import over_tasks
from metafocus.types import Aux, Episode, Params, Solution, Solver
from metafocus.windows import Window, Windows, windows

__version__ = "0.1.0"

__all__ = [
    "BOME",
    "CG",
    "F2SA",
    "GMRES",
    "PES",
    "SABA",
    "SGD",
    "SOBA",
    "Adagrad",
    "Adam",
    "AdamW",
    "AmIGO",
    "Aux",
    "ClosureError",
    "Comparison",
    "DataError",
    "Dense",
    "ESSingle",
    "Episode",
    "Estimator",
    "EvoGrad",
    "FirstOrder",
    "FixedPoint",
    "FullWeights",
    "Given",
    "Identity",
    "Implicit",
    "LoRA",
    "MaskPolicy",
    "MetaLoss",
    "MetafocusError",
    "Muon",
    "Neumann",
    "NonFiniteError",
    "NotStationaryWarning",
    "Nystrom",
    "OneStep",
    "Params",
    "Penalty",
    "Placement",
    "PlacementError",
    "Problem",
    "ProblemError",
    "RMSprop",
    "Solution",
    "Solver",
    "Spans",
    "StocBiO",
    "TransformError",
    "Unrolled",
    "WarmStart",
    "Window",
    "Windows",
    "adapt",
    "adjoint",
    "all_linear",
    "all_tokens",
    "answer_tokens",
    "attention",
    "bilevel",
    "clip_global",
    "clip_per_tensor",
    "compare",
    "compiled",
    "context_tokens",
    "diagnostics",
    "errors",
    "evolution",
    "hvp_finite",
    "hvp_forward",
    "hvp_reverse",
    "hypergrad",
    "lm_loss",
    "masks",
    "matching",
    "over_tasks",
    "per_step",
    "proximal",
    "recipes",
    "recompute",
    "single_loop",
    "top_layers",
    "windows",
]
