"""Masks as one interval of keys per query, and their conversion to what kernels take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from metafocus.checks import whole
from metafocus.errors import ProblemError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(b, h, q, k) -> bool`, four integer tensors that broadcast."""


class Spans(NamedTuple):
    """The keys that each query may attend to: `start[b, i] <= k < stop[b, i]`.

    If both are equal, the query sees nothing. A mask costs O(S) memory instead of O(S^2). It is a
    named tuple of two tensors and therefore a pytree: it can be stacked, and it passes through
    `torch.func.vmap`.

    Attributes:
        start: The first key of each query, int64 `[B, S]`.
        stop: One past the last key of each query, int64 `[B, S]`.

    Example:
        >>> spans = Spans(torch.tensor([[0, 0, 0]]), torch.tensor([[2, 2, 3]]))
        >>> spans.dense().int().tolist()
        [[[[1, 1, 0], [1, 1, 0], [1, 1, 1]]]]
    """

    start: Tensor
    stop: Tensor

    def __and__(self, other: Spans) -> Spans:
        """Return the keys that both allow: `[max(start), min(stop))`, or `[0, 0)` if it is empty.

        Example:
            >>> a = Spans(torch.tensor([[0, 0]]), torch.tensor([[1, 2]]))
            >>> b = Spans(torch.tensor([[0, 1]]), torch.tensor([[0, 2]]))
            >>> [t.tolist() for t in a & b]
            [[[0, 1]], [[0, 2]]]

        Raises:
            ProblemError: If `other` has another shape.
        """
        if not isinstance(other, Spans):
            return NotImplemented
        if self.start.shape != other.start.shape:
            raise ProblemError(
                f"a & b needs spans of one shape, got {list(self.start.shape)} and "
                f"{list(other.start.shape)}; make both of the same batch"
            )
        return nonempty(
            torch.maximum(self.start, other.start), torch.minimum(self.stop, other.stop)
        )

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the mask as a `[B, 1, S, S]` tensor: boolean (True = may attend) or additive.

        An additive mask is 0 where a key is allowed, and `max(finfo(dtype).min,
        finfo(float32).min)` elsewhere. Eager attention computes its softmax in float32. There the
        minimum of float64 would be -inf, and a row without keys would be NaN.

        Args:
            dtype: None for a boolean mask, or the floating-point type of an additive one.

        Returns:
            The mask, `[B, 1, S, S]`.

        Raises:
            ProblemError: If `dtype` is not a floating-point type.

        Example:
            >>> Spans(torch.tensor([[0, 0]]), torch.tensor([[1, 2]])).dense(torch.float32)[0, 0, 1]
            tensor([0., 0.])
        """
        keys = torch.arange(self.start.shape[-1], device=self.start.device)
        allowed = (self.start.unsqueeze(-1) <= keys) & (keys < self.stop.unsqueeze(-1))
        allowed = allowed.unsqueeze(-3)
        if dtype is None:
            return allowed
        if not dtype.is_floating_point:
            raise ProblemError(
                f"dense(dtype={dtype}) is neither boolean nor additive; pass None for a boolean "
                "mask or a floating-point dtype for an additive one"
            )
        lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        zero = torch.zeros((), dtype=dtype, device=allowed.device)
        return torch.where(allowed, zero, torch.full_like(zero, lowest))

    @property
    def mask_mod(self) -> MaskMod:
        """Return `(b, h, q, k) -> bool`: whether query `q` of row `b` may attend to key `k`.

        This is the convention of transformers and flex_attention: the four arguments are integer
        tensors that broadcast. The head `h` does not matter here.

        Example:
            >>> spans = Spans(torch.tensor([[0, 0]]), torch.tensor([[1, 2]]))
            >>> zero, one = torch.tensor(0), torch.tensor(1)
            >>> spans.mask_mod(zero, zero, zero, one)
            tensor(False)
        """
        start, stop = self

        # It is a closure, because flex_attention would count the `self` of a method as an argument.
        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (start[b, q] <= k) & (k < stop[b, q])

        return mask_mod

    def block_mask(self, block_size: int = 128) -> BlockMask:
        """Return the mask for `torch.nn.attention.flex_attention`, without forming `[S, S]`.

        The intervals tell for each block of queries and keys whether it can be skipped or is
        allowed completely. This needs `(S / block_size)^2` numbers.

        Args:
            block_size: The number of queries and of keys per block.

        Returns:
            A `BlockMask` of shape `[B, 1, S, S]`.

        Example:
            >>> Spans(torch.tensor([[0, 0]]), torch.tensor([[1, 2]])).block_mask().shape
            (1, 1, 2, 2)

        Raises:
            ProblemError: If `block_size` is below 1.
        """
        from torch.nn.attention.flex_attention import BlockMask

        whole("block_mask: block_size", block_size, 1, error=ProblemError)
        start, stop = self
        length = start.shape[-1]

        def blocks(bound: Tensor, fill: int) -> Tensor:
            padded = functional.pad(bound, (0, -length % block_size), value=fill)
            return padded.unflatten(-1, (-1, block_size))

        # Queries without keys, and the padding of the last block, must not widen the range of keys
        # of a block, and such a block must not count as allowed completely.
        first = blocks(torch.where(start < stop, start, length), length).amin(-1, keepdim=True)
        last = blocks(stop, 0).amax(-1, keepdim=True)
        left = torch.arange(first.shape[-2], device=start.device) * block_size
        right = left + block_size
        touched = (first < right) & (left < last)
        all_of_it = (blocks(start, length).amax(-1, keepdim=True) <= left) & (
            right <= blocks(stop, 0).amin(-1, keepdim=True)
        )

        def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
            order = chosen.int().argsort(dim=-1, descending=True, stable=True)
            return chosen.sum(-1).int().unsqueeze(1), order.int().unsqueeze(1)

        return BlockMask.from_kv_blocks(
            *listed(touched & ~all_of_it),
            *listed(all_of_it),
            BLOCK_SIZE=block_size,
            mask_mod=self.mask_mod,
            seq_lengths=(length, length),
        )

    def stack(self) -> Tensor:
        """Return the spans as one integer tensor `[B, 1, S, 2]`, for use as a 4-D attention mask.

        Example:
            >>> Spans(torch.tensor([[0, 0]]), torch.tensor([[1, 2]])).stack().tolist()
            [[[[0, 1], [0, 2]]]]
        """
        return torch.stack((self.start, self.stop), dim=-1).unsqueeze(-3)

    @classmethod
    def unstack(cls, stacked: Tensor) -> Spans:
        """Return the spans from what `stack` returned.

        Args:
            stacked: An integer tensor `[B, 1, S, 2]`.

        Returns:
            The spans, `[B, S]` each.

        Raises:
            ProblemError: If `stacked` has another shape or is not integer.

        Example:
            >>> spans = Spans(torch.tensor([[0, 0]]), torch.tensor([[1, 2]]))
            >>> Spans.unstack(spans.stack()).stop.tolist()
            [[1, 2]]
        """
        shape = tuple(stacked.shape)
        integer = not (stacked.is_floating_point() or stacked.dtype == torch.bool)
        if len(shape) != 4 or shape[1] != 1 or shape[3] != 2 or not integer:
            raise ProblemError(
                f"stacked spans must be an integer tensor [B, 1, S, 2], got {stacked.dtype} of "
                f"shape {list(shape)}; build it with Spans.stack()"
            )
        start, stop = stacked.squeeze(-3).unbind(-1)
        return cls(start, stop)


def nonempty(start: Tensor, stop: Tensor) -> Spans:
    """Return spans in which every empty interval is written as `[0, 0)`.

    Args:
        start: The first keys, integer `[B, S]`.
        stop: One past the last keys, integer `[B, S]`.

    Returns:
        The normalised spans.

    Example:
        >>> nonempty(torch.tensor([[3]]), torch.tensor([[1]])).stop
        tensor([[0]])
    """
    some = start < stop
    return Spans(torch.where(some, start, 0), torch.where(some, stop, 0))


def windowed(spans: Spans, window: int) -> Spans:
    """Return spans without the keys that are `window` or more positions before their query.

    Args:
        spans: The spans, `[B, S]`.
        window: The number of keys that a causal query keeps, including itself; at least 1.

    Returns:
        The narrower spans.

    Example:
        >>> causal = Spans(torch.tensor([[0, 0, 0]]), torch.tensor([[1, 2, 3]]))
        >>> windowed(causal, 2).start
        tensor([[0, 0, 1]])

    Raises:
        ProblemError: If `window` is below 1, which would leave a causal query without keys.
    """
    whole("windowed: window", window, 1, error=ProblemError)
    query = torch.arange(spans.start.shape[-1], device=spans.start.device)
    return spans & Spans((query - window + 1).clamp(min=0).expand_as(spans.start), spans.stop)
