"""Bilevel algorithms with one loop: both levels move a little at every step.

Each is a frozen dataclass with two pure functions, `init(outer) -> state` and
`step(outer, state, episode) -> (grads, state, aux)`. `grads` is the estimate for the outer
parameters, to be used by any outer optimiser; the state is a pytree of tensors, to be saved and
vmapped. The inner batch is the episode's support, the outer batch its query.
"""

from __future__ import annotations

from metafocus.single_loop.amigo import AmIGO, AmIGOState
from metafocus.single_loop.bome import BOME, BOMEState
from metafocus.single_loop.common import StepAux
from metafocus.single_loop.f2sa import F2SA, F2SAState
from metafocus.single_loop.finite_sum import Term, draw
from metafocus.single_loop.saba import SABA, SABAState
from metafocus.single_loop.soba import SOBA, SOBAState
from metafocus.single_loop.stocbio import StocBiO, StocBiOState

__all__ = [
    "BOME",
    "F2SA",
    "SABA",
    "SOBA",
    "AmIGO",
    "AmIGOState",
    "BOMEState",
    "F2SAState",
    "SABAState",
    "SOBAState",
    "StepAux",
    "StocBiO",
    "StocBiOState",
    "Term",
    "draw",
]
