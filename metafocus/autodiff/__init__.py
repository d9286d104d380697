"""Derivatives: two back ends that agree, second-order products, recomputation, operators.

`backends` takes first derivatives, on the tape or by `torch.func`; `hvp` multiplies with second
ones; `recompute` trades time for memory under every transform; `composites` says where a fused
operator would be wrong or lacks a derivative, `operators` what stands in for it.
"""

from __future__ import annotations

from metafocus.autodiff.backends import pullback, value_and_grad, vjp
from metafocus.autodiff.composites import differentiable_twice
from metafocus.autodiff.hvp import hvp_finite, hvp_forward, hvp_reverse

__all__ = [
    "differentiable_twice",
    "hvp_finite",
    "hvp_forward",
    "hvp_reverse",
    "pullback",
    "value_and_grad",
    "vjp",
]
