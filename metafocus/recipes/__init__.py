"""Methods of the literature, each in a few lines."""

from __future__ import annotations

from metafocus.recipes import fewshot, hpo
from metafocus.recipes._attribution import (
    Attribution,
    attribution,
    influence,
)
from metafocus.recipes._datamodeling import Score, linear_datamodeling_score
from metafocus.recipes._focusft import focusft, focusft_problem
from metafocus.recipes._learned_optimiser import LearnedOptimiser
from metafocus.recipes._training_runs import datarater, distill, generated, weights
from metafocus.recipes.ttt import export, qttt, ttt_e2e

__all__ = [
    "Attribution",
    "LearnedOptimiser",
    "Score",
    "attribution",
    "datarater",
    "distill",
    "export",
    "fewshot",
    "focusft",
    "focusft_problem",
    "generated",
    "hpo",
    "influence",
    "linear_datamodeling_score",
    "qttt",
    "ttt_e2e",
    "weights",
]
