"""Inner solvers: optimisers as pure functions of fast weights, gradients and a state."""

from __future__ import annotations

from metafocus.solvers.adam import Adam, AdamW
from metafocus.solvers.adaptive import Adagrad, RMSprop
from metafocus.solvers.clipping import Clip, clip_global, clip_per_tensor
from metafocus.solvers.descent import solve_inner
from metafocus.solvers.given import Given
from metafocus.solvers.muon import Muon
from metafocus.solvers.rates import Rate, per_step
from metafocus.solvers.sgd import SGD

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Clip",
    "Given",
    "Muon",
    "RMSprop",
    "Rate",
    "clip_global",
    "clip_per_tensor",
    "per_step",
    "solve_inner",
]
