"""Compare hypergradient estimators on one problem: error, cosine, time, memory and a verdict."""

from __future__ import annotations

from metafocus.comparison.report import Comparison, environment
from metafocus.comparison.run import compare

__all__ = ["Comparison", "compare", "environment"]
