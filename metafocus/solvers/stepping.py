"""What a step is made of: gradients with a coupled decay, and moves along a direction."""

from __future__ import annotations

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.solvers.clipping import Clip
from metafocus.torch_internals import moved_by, tracing
from metafocus.types import Params


def coupled(grads: Params, params: Params, clip: Clip | None, weight_decay: float) -> Params:
    """Return the clipped gradients of `loss + weight_decay / 2 |p|^2`, the decay not clipped."""
    if clip is not None:
        grads = clip(grads)
    return pt.add(grads, params, weight_decay) if weight_decay else grads


def all_moved(a: Params, by: float, b: Params) -> Params:
    """Return `a + by * b` of all fast weights."""
    if pt.constant(a) and pt.constant(b):
        parts = moved_by([*a.values()], by, [b[k] for k in a])
        return dict(zip(a, parts, strict=True))
    return {k: moved(a[k], by, b[k]) for k in a}


def moved(a: Tensor, by: float | Tensor, b: Tensor) -> Tensor:
    """Return `a + by * b` of one fast weight."""
    # One kernel and one node of the graph; a learned rate is a tensor and needs two. Inductor of
    # torch 2.13 takes add(a, mm(x, y), alpha) for addmm and drops alpha, without an error.
    if isinstance(by, Tensor) or tracing():
        return a + by * b
    return torch.add(a, b, alpha=by)
