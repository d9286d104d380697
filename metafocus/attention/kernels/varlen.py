"""The two libraries with a fused variable-length kernel on CUDA, behind one small contract."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metafocus.attention.kernels.kernel import Scaling
from metafocus.torch_internals import flash_varlen, flash_varlen_backward


class Lengths(NamedTuple):
    """Several sequences one after another: where each begins, and what its queries see.

    Attributes:
        queries: First query of each sequence, and the end of the last: int32 `[N + 1]`.
        keys: The same for the keys.
        longest_queries: Queries of the longest sequence.
        longest_keys: Keys of the longest.
        left: Keys to the left of the diagonal that ends at the bottom right corner; -1 for all.
        right: Keys to the right of it; -1 for all.
    """

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    left: int
    right: int

    @property
    def causal(self) -> bool:
        """Whether queries see all keys up to the diagonal."""
        return self.left < 0 and self.right == 0


class Varlen(Protocol):
    """Attention of sequences laid out one after another, and its gradient.

    `q` is `[Tq, H, D]`, `k` and `v` are `[Tk, Hkv, D]`, all with dense rows.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scaling: Scaling
    ) -> tuple[Tensor, Tensor]:
        """Return the output `[Tq, H, D]` and the logsumexp in float32 `[H, Tq]`."""
        ...

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        lengths: Lengths,
        scaling: Scaling,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of `<do, output>` with respect to `q`, `k` and `v`."""
        ...


class TorchVarlen:
    """The kernels that torch brings along, as `torch.nn.attention.varlen` calls them.

    Not by `varlen_attn` itself, whose gradient hangs on its own graph: here the forward pass has no
    graph, and the gradient is asked for later.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scaling: Scaling
    ) -> tuple[Tensor, Tensor]:
        """Return the output and the logsumexp."""
        out, lse, *_ = flash_varlen(
            q,
            k,
            v,
            lengths.queries,
            lengths.keys,
            lengths.longest_queries,
            lengths.longest_keys,
            0.0,
            lengths.causal,
            False,
            scale=scaling.scale,
            window_size_left=lengths.left,
            window_size_right=lengths.right,
        )
        return out, lse

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        lengths: Lengths,
        scaling: Scaling,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients with respect to `q`, `k` and `v`."""
        # The state of the random numbers, which dropout alone would read.
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return flash_varlen_backward(
            do,
            q,
            k,
            v,
            o,
            lse,
            lengths.queries,
            lengths.keys,
            lengths.longest_queries,
            lengths.longest_keys,
            0.0,
            lengths.causal,
            seed,
            torch.empty(0, device=q.device),
            scale=scaling.scale,
            window_size_left=lengths.left,
            window_size_right=lengths.right,
        )


class FlashAttn:
    """The kernels of the package flash-attn, from version 2.7 on; they know soft caps too."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scaling: Scaling
    ) -> tuple[Tensor, Tensor]:
        """Return the output and the logsumexp."""
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]

        out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(
            q,
            k,
            v,
            lengths.queries,
            lengths.keys,
            lengths.longest_queries,
            lengths.longest_keys,
            0.0,
            scaling.scale,
            causal=lengths.causal,
            window_size_left=lengths.left,
            window_size_right=lengths.right,
            softcap=scaling.softcap or 0.0,
        )
        return out, lse

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        lengths: Lengths,
        scaling: Scaling,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients with respect to `q`, `k` and `v`."""
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]

        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        flash_attn_interface._flash_attn_varlen_backward(
            do,
            q,
            k,
            v,
            o,
            lse,
            dq,
            dk,
            dv,
            lengths.queries,
            lengths.keys,
            lengths.longest_queries,
            lengths.longest_keys,
            0.0,
            scaling.scale,
            causal=lengths.causal,
            window_size_left=lengths.left,
            window_size_right=lengths.right,
            softcap=scaling.softcap or 0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


def installed() -> Varlen:
    """Return flash-attn's kernels where a version is installed that has them, else torch's own."""
    return FlashAttn() if _has_flash_attn() else TorchVarlen()


@functools.cache
def _has_flash_attn() -> bool:
    if importlib.util.find_spec("flash_attn") is None:
        return False
    try:
        version = importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return False
    major, minor = (int(part) for part in version.split(".")[:2])
    # Version 4 is another package with the same name space.
    return major == 2 and minor >= 7
