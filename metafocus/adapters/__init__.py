"""Adapters define fast weights and how a model sees them; placements say where they go."""

from __future__ import annotations

from metafocus.adapters.full_weights import FullWeights
from metafocus.adapters.lora import LoRA
from metafocus.adapters.low_rank import for_each, one_of
from metafocus.adapters.no_adapter import NoAdapter
from metafocus.adapters.placement import Placement, all_linear, matching, top_layers
from metafocus.adapters.protocol import Adapter

__all__ = [
    "Adapter",
    "FullWeights",
    "LoRA",
    "NoAdapter",
    "Placement",
    "all_linear",
    "for_each",
    "matching",
    "one_of",
    "top_layers",
]
