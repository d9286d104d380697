"""Constants that take over the derivative of other tensors: the straight-through tie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafocus.torch_internals import outside_transforms, sole_vmap, transforming
from metafocus.types import Params

SMALL = 2**14
"""Below so many entries the arithmetic is cheaper than a custom Function."""


def tied_to(start: Params, fast: Params) -> Params:
    """Return the values of `fast`, which are constants, with the derivative of `start`.

    Large weights are neither read nor copied on the tape, also below one `vmap`: the result shares
    the memory of `fast`.

    Example:
        >>> w = torch.tensor([3.0], requires_grad=True)
        >>> tied = tied_to({"w": w}, {"w": torch.tensor([5.0])})["w"]
        >>> (tied**2).sum().backward()
        >>> tied.detach(), w.grad
        (tensor([5.]), tensor([10.]))
    """
    vmap = sole_vmap()
    size = sum(x.numel() for x in fast.values()) * (1 if vmap is None else vmap.size)
    if size < SMALL or (vmap is None and transforming()):
        # In nested forward mode a custom Function would be wrong.
        return {k: v + (start[k] - start[k].detach()) for k, v in fast.items()}
    if vmap is None:
        return _by_function(start, fast)
    with outside_transforms():
        plain = [{k: vmap.outside(x) for k, x in p.items()} for p in (start, fast)]
        found = _by_function(*plain)
    return {k: vmap.inside(x) for k, x in found.items()}


def _by_function(start: Params, fast: Params) -> Params:
    moving = [k for k in fast if start[k].requires_grad] if torch.is_grad_enabled() else []
    if not moving:
        return fast
    tied = _Tied.apply(len(moving), *(start[k] for k in moving), *(fast[k] for k in moving))
    return {**fast, **dict(zip(moving, tied, strict=True))}


class _Tied(torch.autograd.Function):
    """The identity on the second half of its tensors, differentiated as if it were on the first."""

    @staticmethod
    def forward(ctx: Any, size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in tensors[size:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        return None, *cotangents, *[None] * len(cotangents)
