"""A problem, an inner solver and an estimator become one differentiable function.

`building` puts the meta loss together from parts that `checked_parts` looks at; `evaluating` is one
evaluation of it, and `outer_call` the call from outside around that. `hypergradient` differentiates
a meta loss; `adaptation` runs the inner loop alone.
"""

from __future__ import annotations

from metafocus.engine.adaptation import adapt
from metafocus.engine.building import bilevel
from metafocus.engine.hypergradient import hypergrad
from metafocus.engine.outer_call import META_LOSS, MetaLoss

__all__ = ["META_LOSS", "MetaLoss", "adapt", "bilevel", "hypergrad"]
