"""Several ranks that compute one thing: collectives with all derivatives, shares of sequences."""

from __future__ import annotations

from metafocus.parallel.collectives import exchanged, replicated, summed
from metafocus.parallel.fsdp2 import average_over_groups
from metafocus.parallel.sequence import (
    refuse_other_batches,
    refuse_other_starts,
    sequence_group,
    share,
    whole_length,
)

__all__ = [
    "average_over_groups",
    "exchanged",
    "refuse_other_batches",
    "refuse_other_starts",
    "replicated",
    "sequence_group",
    "share",
    "summed",
    "whole_length",
]
