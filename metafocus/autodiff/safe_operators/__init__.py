"""Operators of torch written out in pieces that have derivatives of every order.

Each takes the arguments of its namesake in `torch.nn.functional` and equals it; `composites` says
when one replaces the other.
"""

from __future__ import annotations

from metafocus.autodiff.safe_operators._attention import attention, multi_head_attention
from metafocus.autodiff.safe_operators._batch_norm import batch_norm
from metafocus.autodiff.safe_operators._cross_entropy import cross_entropy
from metafocus.autodiff.safe_operators.losses import huber_loss, mse_loss, soft_margin_loss
from metafocus.autodiff.safe_operators.norms import (
    group_norm,
    instance_norm,
    layer_norm,
    weight_norm,
)
from metafocus.autodiff.safe_operators.pointwise import hardsigmoid, mish, silu
from metafocus.autodiff.safe_operators.rows import cdist, embedding, pdist

__all__ = [
    "attention",
    "batch_norm",
    "cdist",
    "cross_entropy",
    "embedding",
    "group_norm",
    "hardsigmoid",
    "huber_loss",
    "instance_norm",
    "layer_norm",
    "mish",
    "mse_loss",
    "multi_head_attention",
    "pdist",
    "silu",
    "soft_margin_loss",
    "weight_norm",
]
