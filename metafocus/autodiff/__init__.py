"""Derivatives: two back ends that agree, second-order products, recomputation, operators.

`grad` takes first derivatives, on the tape or by `torch.func`; `hvp` multiplies with second ones;
`recompute` trades time for memory under every transform; `safe_operators` replaces fused operators
that would be wrong or lack a derivative.
"""

from __future__ import annotations

from metafocus.autodiff.grad import pullback, value_and_grad, vjp
from metafocus.autodiff.hvp import hvp_finite, hvp_forward, hvp_reverse
from metafocus.autodiff.safe_operators.swapping import differentiable_twice

__all__ = [
    "differentiable_twice",
    "hvp_finite",
    "hvp_forward",
    "hvp_reverse",
    "pullback",
    "value_and_grad",
    "vjp",
]
