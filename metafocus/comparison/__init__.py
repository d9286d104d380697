"""Compare hypergradient estimators on one problem: error, cosine, time, memory and a verdict."""

from __future__ import annotations

from metafocus.comparison.report import Comparison, environment
from metafocus.comparison.run import ALIGNED, compare

__all__ = ["ALIGNED", "Comparison", "compare", "environment"]
