"""Methods of the literature, each in a few lines."""

from __future__ import annotations

from metafocus.recipes import fewshot, hpo
from metafocus.recipes._focusft import focusft, focusft_problem
from metafocus.recipes.ttt import export, qttt, ttt_e2e

__all__ = [
    "export",
    "fewshot",
    "focusft",
    "focusft_problem",
    "hpo",
    "qttt",
    "ttt_e2e",
]
