"""Compare hypergradient estimators on one problem: error, cosine, time, memory and a verdict."""

from __future__ import annotations

from metafocus.comparison.inner_curve import diverges
from metafocus.comparison.report import Comparison, environment
from metafocus.comparison.run import compare
from metafocus.comparison.verdicts import ALIGNED

__all__ = ["ALIGNED", "Comparison", "compare", "diverges", "environment"]
