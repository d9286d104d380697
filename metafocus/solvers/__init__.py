"""Inner solvers: optimisers as pure functions of fast weights, gradients and a state."""

from __future__ import annotations

from metafocus.solvers.given import Given
from metafocus.solvers.muon import Muon
from metafocus.solvers.optimizers import SGD, Adagrad, Adam, AdamW, RMSprop
from metafocus.solvers.stepping import Clip, Rate, clip_global, clip_per_tensor, per_step

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
]
