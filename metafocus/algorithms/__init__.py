"""Hypergradients that are not estimators: they return gradients and carry an explicit state.

Each is a frozen dataclass with pure functions: `init` returns the first state, and `step` (or
`loss`, for `Windows`) takes a state and returns the next one. The states are pytrees of tensors,
so that they can be saved, stacked and vmapped. `Windows` cuts one long inner loop into truncated
windows; `Evolution`, `PES` and `ESSingle` need no derivatives; the others move both levels a
little at every step (single loop). The inner batch is the episode's support, the outer batch its
query.
"""

from __future__ import annotations

from metafocus.algorithms.amigo import AmIGO, AmIGOState
from metafocus.algorithms.bome import BOME, BOMEState
from metafocus.algorithms.common import Level, StepAux, levels
from metafocus.algorithms.evolution import Evolution, EvolutionState
from metafocus.algorithms.f2sa import F2SA, F2SAState
from metafocus.algorithms.finite_sum import Term, draw
from metafocus.algorithms.pes import PES, ESSingle, ESSingleState, ParticleAux, PESState
from metafocus.algorithms.saba import SABA, SABAState
from metafocus.algorithms.soba import SOBA, SOBAState
from metafocus.algorithms.stocbio import StocBiO, StocBiOState
from metafocus.algorithms.windows import Window, Windows

__all__ = [
    "BOME",
    "F2SA",
    "PES",
    "SABA",
    "SOBA",
    "AmIGO",
    "AmIGOState",
    "BOMEState",
    "ESSingle",
    "ESSingleState",
    "Evolution",
    "EvolutionState",
    "F2SAState",
    "Level",
    "PESState",
    "ParticleAux",
    "SABAState",
    "SOBAState",
    "StepAux",
    "StocBiO",
    "StocBiOState",
    "Term",
    "Window",
    "Windows",
    "draw",
    "levels",
]
