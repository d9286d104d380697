"""metafocus: hypergradients of every kind behind one interface, on torch.func.

A bilevel problem + an inner solver + an estimator = one ordinary scalar function of the outer
parameters, whose ordinary derivative is the chosen hypergradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metafocus import (
    algorithms,
    attention,
    data,
    diagnostics,
    errors,
    masks,
    models,
    parallel,
    params,
    recipes,
)
from metafocus.adapters import (
    Adapter,
    FullWeights,
    LoRA,
    NoAdapter,
    Placement,
    all_linear,
    matching,
    top_layers,
)
from metafocus.autodiff import (
    differentiable_twice,
    hvp_finite,
    hvp_forward,
    hvp_reverse,
    stores,
)
from metafocus.autodiff.pieces import micro_batches
from metafocus.autodiff.recompute import recompute
from metafocus.cells import sweep
from metafocus.comparison import Comparison, compare
from metafocus.comparison.smooth import Smoothness, smoothness
from metafocus.engine import MetaLoss, adapt, bilevel, hypergrad
from metafocus.episodes import stack_episodes
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
from metafocus.explaining import Explanation, explain
from metafocus.graph import compiled
from metafocus.linear import CG, GMRES, Dense, Identity, Neumann, Nystrom, WarmStart
from metafocus.lm import TokenPolicy, all_tokens, answer_tokens, context_tokens, lm_loss
from metafocus.masks import MaskPolicy, Spans
from metafocus.preflight import trust
from metafocus.problem import Problem, from_slow, proximal, trainable
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
    solve_inner,
)
from metafocus.streams import Batches, PerStep, shared, zipped
from metafocus.tasks import over_tasks
from metafocus.types import (
    HVP,
    Aux,
    Episode,
    InnerLoss,
    LinearSolver,
    OuterLoss,
    Params,
    Solution,
    Solver,
)

if TYPE_CHECKING:
    from metafocus.trainer import FocusArguments, FocusTrainer

__version__ = "0.2.0"

__all__ = [
    "CG",
    "GMRES",
    "HVP",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adapter",
    "Aux",
    "Batches",
    "Comparison",
    "Dense",
    "Episode",
    "Estimator",
    "EvoGrad",
    "Explanation",
    "FirstOrder",
    "FixedPoint",
    "FocusArguments",
    "FocusTrainer",
    "FullWeights",
    "Given",
    "Identity",
    "Implicit",
    "InnerLoss",
    "LinearSolver",
    "LoRA",
    "MaskPolicy",
    "MetaLoss",
    "Muon",
    "Neumann",
    "NoAdapter",
    "Nystrom",
    "OneStep",
    "OuterLoss",
    "Params",
    "Penalty",
    "PerStep",
    "Placement",
    "Problem",
    "RMSprop",
    "Smoothness",
    "Solution",
    "Solver",
    "Spans",
    "TokenPolicy",
    "Unrolled",
    "WarmStart",
    "adapt",
    "adjoint",
    "algorithms",
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
    "data",
    "diagnostics",
    "differentiable_twice",
    "errors",
    "explain",
    "from_slow",
    "hvp_finite",
    "hvp_forward",
    "hvp_reverse",
    "hypergrad",
    "lm_loss",
    "masks",
    "matching",
    "micro_batches",
    "models",
    "over_tasks",
    "parallel",
    "params",
    "per_step",
    "proximal",
    "recipes",
    "recompute",
    "shared",
    "smoothness",
    "solve_inner",
    "stack_episodes",
    "stores",
    "sweep",
    "top_layers",
    "trainable",
    "trust",
    "zipped",
]


def __getattr__(name: str) -> Any:
    # transformers' Trainer is slow to import: only for those who use it.
    if name in ("FocusArguments", "FocusTrainer"):
        from metafocus import trainer

        return getattr(trainer, name)
    import sys

    # With name and obj, Python itself suggests the nearest name.
    raise AttributeError(
        f"module 'metafocus' has no attribute {name!r}{_meant(name)}",
        name=name,
        obj=sys.modules[__name__],
    )


def _meant(name: str) -> str:
    """Return where the name is in other letters or in another module, or an empty text."""
    fewshot = [k for k, v in vars(recipes.fewshot).items() if callable(v)]
    homes = {
        "mf": __all__,
        "mf.recipes": recipes.__all__,
        "mf.recipes.fewshot": fewshot,
        "mf.algorithms": algorithms.__all__,
    }
    same = [
        (found != name, f": write {home}.{found}")
        for home, known in homes.items()
        for found in known
        if found.lower() == name.lower()
    ]
    return min(same, default=(False, ""))[1]
