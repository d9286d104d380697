"""Gradients scaled to a largest norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.checks import positive
from metafocus.precision import wide
from metafocus.torch_internals import norms, scaled
from metafocus.types import Params

Clip = Callable[[Params], Params]
"""`gradients -> gradients`: any pure function of them."""


_IN_ONE_KERNEL = [(dtype, torch.strided) for dtype in (torch.float32, torch.float64)]
"""Half types are scaled in a wider one."""


@dataclass(frozen=True)
class clip_per_tensor:
    """Scale each gradient tensor to a norm of at most `limit`: `g * min(1, limit / |g|)`.

    Args:
        limit: the largest norm of a tensor.

    Raises:
        ValueError: for a limit that is not positive.

    Example:
        >>> clip_per_tensor(1.0)({"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.5])})
        {'w': tensor([0.6000, 0.8000]), 'b': tensor([0.5000])}
    """

    limit: float

    def __post_init__(self) -> None:
        positive("limit", self.limit)

    def __call__(self, grads: Params) -> Params:
        """Clip."""
        kinds = {(g.dtype, g.device, g.layout) for g in grads.values()}
        if len(kinds) == 1 and kinds.pop()[::2] in _IN_ONE_KERNEL and pt.constant(grads):
            tensors = [*grads.values()]
            # A norm of 0 gives an infinite factor, and so 1.
            factors = (self.limit / norms(tensors)).clamp(max=1)
            return dict(zip(grads, scaled(tensors, factors), strict=True))
        return {k: _shrunk(g, shrink(_square(g), self.limit)) for k, g in grads.items()}


@dataclass(frozen=True)
class clip_global:
    """Scale all gradients together to a norm of at most `limit`, as `clip_grad_norm_` does.

    Args:
        limit: the largest norm over all entries of all tensors.

    Raises:
        ValueError: for a limit that is not positive.

    Example:
        >>> clip_global(1.0)({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        {'w': tensor([0.6000]), 'b': tensor([0.8000])}
    """

    limit: float

    def __post_init__(self) -> None:
        positive("limit", self.limit)

    def __call__(self, grads: Params) -> Params:
        """Clip."""
        if not grads:
            return grads
        factor = shrink(torch.stack([_square(g) for g in grads.values()]).sum(), self.limit)
        return {k: _shrunk(g, factor) for k, g in grads.items()}


def shrink(square: Tensor, limit: float) -> Tensor:
    """Return `min(1, limit / norm)` from the square of a norm."""
    # On squares and with a guarded square root, so that a zero gradient has derivatives of every
    # order; the plain form is 0 * inf there.
    active = square > limit * limit
    return torch.where(active, limit * torch.rsqrt(torch.where(active, square, 1.0)), 1.0)


def normalised(x: Tensor, eps: float) -> Tensor:
    """Return `x / max(|x|, eps)`, with derivatives of every order also at zero."""
    return _shrunk(x, shrink(_square(x), eps) / eps)


def _square(x: Tensor) -> Tensor:
    # Half types cannot hold the square of 300, nor a factor of 1e-6 with all digits.
    x = wide(x)
    return (x * x).sum()


def _shrunk(x: Tensor, factor: Tensor) -> Tensor:
    return (wide(x) * factor).to(x.dtype)
