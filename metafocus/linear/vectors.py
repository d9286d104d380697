"""What linear solvers share: the system on one real vector, scaled so that squares are safe."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metafocus.types import MatVec, Params

ROUNDINGS = 10
"""How many roundings of one product a residual gathers before it is nothing but rounding."""


class System(NamedTuple):
    """`A x = b` on one real vector, in float32 or wider; a complex entry is two real ones.

    Attributes:
        right: `b / size`.
        size: the largest absolute entry of `b`: without it squares underflow or overflow.
        product: `v -> A v`. The function behind it is given the types of `b`.
        noise: relative size of what rounding leaves in a residual.
        narrow: whether products round to a half type.
        flat: fast weights as one vector.
        unflat: a vector with the names, shapes and types of `b`.
    """

    right: Tensor
    size: Tensor
    product: Callable[[Tensor], Tensor]
    noise: float
    narrow: bool
    flat: Callable[[Params], Tensor]
    unflat: Callable[[Tensor], Params]

    def solution(self, v: Tensor) -> Params:
        """Return the solution for `b` from that for `right`."""
        return self.unflat(v * self.size)

    def lost(self, v: Tensor, damping: float, expected: Tensor) -> Tensor:
        """Return how far a residual is from the expected one, over the length of `right`.

        In float32 and wider this is not measured, and zero. A half type costs one product.

        Args:
            v: the solution for `right`.
            damping: what is added to the diagonal of `A`.
            expected: the length of the residual without rounding, as the solver knows it.
        """
        if not self.narrow:
            return torch.zeros_like(expected)
        rounded = self.flat(self.solution(v)) / self.size
        residual = self.right - self.product(rounded) - damping * rounded
        true = torch.linalg.vector_norm(residual)
        return relative(true - expected, self.right)


def posed(matvec: MatVec, b: Params) -> System:
    """Return the system on one vector."""
    flat, unflat = _flattening(b)
    right = flat(b)
    size = unit(right)
    noise = ROUNDINGS * torch.finfo(right.dtype).eps
    narrow = [info.eps for info in (torch.finfo(v.dtype) for v in b.values()) if info.bits < 32]

    def product(v: Tensor) -> Tensor:
        return flat(matvec(unflat(v)))

    def scaled_product(v: Tensor) -> Tensor:
        # float16 holds five digits of range: each vector gets a largest entry of 1.
        length = unit(v)
        return product(v / length) * length

    used = scaled_product if narrow else product
    noise += max(narrow, default=0.0)
    return System(right / size, size, used, noise, bool(narrow), flat, unflat)


def largest(v: Tensor) -> Tensor:
    """Return the largest absolute entry, detached; NaN if any entry is NaN."""
    return v.detach().abs().amax() if v.numel() else v.new_zeros(())


def unit(v: Tensor) -> Tensor:
    """Return what to divide a vector by: its largest absolute entry, or 1 where all are zero."""
    size = largest(v)
    return size + size.logical_not()


def relative(rest: Tensor, right: Tensor) -> Tensor:
    """Return the length of a vector or number over that of `right`, detached; 0 where both are."""
    lengths = [torch.linalg.vector_norm(v.detach()) for v in (rest, right)]
    return lengths[0] / (lengths[1] + lengths[1].logical_not())


def _flattening(like: Params) -> tuple[Callable[[Params], Tensor], Callable[[Tensor], Params]]:
    """Return a function from fast weights of these shapes to one real vector, and its inverse."""
    # Not v.dtype.to_real(): torch.compile does not know it.
    reals = {k: torch.view_as_real(v).dtype if v.is_complex() else v.dtype for k, v in like.items()}
    wide = torch.float32
    for dtype in reals.values():
        wide = torch.promote_types(wide, dtype)
    parts = {k: _part(v, reals[k], wide) for k, v in like.items()}
    if len(like) == 1:
        ((name, (vector, tensor)),) = parts.items()
        return lambda v: vector(v[name]), lambda v: {name: tensor(v)}
    sizes = [v.numel() * (1 + v.is_complex()) for v in like.values()]

    def flat(v: Params) -> Tensor:
        return torch.cat([parts[k][0](v[k]) for k in like]) if like else torch.zeros(0)

    def unflat(v: Tensor) -> Params:
        return {k: parts[k][1](x) for k, x in zip(like, v.split(sizes), strict=True)}

    return flat, unflat


def _part(
    like: Tensor, real: torch.dtype, wide: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    shape = like.shape
    if like.is_complex():
        return (
            lambda v: torch.view_as_real(v.resolve_conj()).reshape(-1).to(wide),
            lambda v: torch.view_as_complex(v.reshape(*shape, 2).to(real)),
        )
    if real == wide:
        return lambda v: v.reshape(-1), lambda v: v.reshape(shape)
    return lambda v: v.reshape(-1).to(wide), lambda v: v.reshape(shape).to(real)
