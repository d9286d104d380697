"""Where a model attends: sinks, context and evidence, for each layer and head."""

from __future__ import annotations

from metafocus.diagnostics.measures import QUERIES, Measures
from metafocus.diagnostics.plots import plot_comparison, plot_engagement
from metafocus.diagnostics.profile import AttentionProfile, Moment
from metafocus.diagnostics.recording import attention_profile

__all__ = [
    "QUERIES",
    "AttentionProfile",
    "Measures",
    "Moment",
    "attention_profile",
    "plot_comparison",
    "plot_engagement",
]
