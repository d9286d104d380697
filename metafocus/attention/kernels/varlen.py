"""The two libraries with a fused variable-length kernel on CUDA, behind one small contract."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.attention
from torch import Tensor

from metafocus.attention.kernels.kernel import QKV, Attended, Scaling
from metafocus.torch_internals import flash_varlen, flash_varlen_backward

NO_DROPOUT = 0.0


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

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Where the sequences begin and how long they are, as both libraries take it."""
        return self[:4]

    @property
    def window(self) -> dict[str, int]:
        """What the queries see, as both libraries take it."""
        return {"window_size_left": self.left, "window_size_right": self.right}


class Varlen(Protocol):
    """Attention of sequences laid out one after another, and its gradient.

    `q` is `[Tq, H, D]`, `k` and `v` are `[Tk, Hkv, D]`, all with dense rows; the output is
    `[Tq, H, D]` and the logsumexp, in float32, `[H, Tq]`.
    """

    def forward(self, inputs: QKV, lengths: Lengths, scaling: Scaling) -> Attended:
        """Return the output and the logsumexp."""
        ...

    def backward(
        self, do: Tensor, inputs: QKV, found: Attended, lengths: Lengths, scaling: Scaling
    ) -> QKV:
        """Return the gradients of `<do, output>`, given what `forward` found."""
        ...


class TorchVarlen:
    """The kernels that torch brings along, as `torch.nn.attention.varlen` calls them.

    After `torch.nn.attention.activate_flash_attention_impl("FA3")`, or "FA4", its operators run the
    kernels of that library.

    Not by `varlen_attn` itself, whose gradient hangs on its own graph: here the forward pass has no
    graph, and the gradient is asked for later.
    """

    def forward(self, inputs: QKV, lengths: Lengths, scaling: Scaling) -> Attended:
        """Return the output and the logsumexp."""
        settings = {"scale": scaling.scale, **lengths.window}
        out, lse, *_ = flash_varlen(
            *inputs, *lengths.bounds, NO_DROPOUT, lengths.causal, False, **settings
        )
        return Attended(out, lse)

    def backward(
        self, do: Tensor, inputs: QKV, found: Attended, lengths: Lengths, scaling: Scaling
    ) -> QKV:
        """Return the gradients."""
        # This is the state of random numbers; only dropout would read it.
        seed = torch.zeros(2, dtype=torch.uint64, device=do.device)
        unused = torch.empty(0, device=do.device)
        settings = {"scale": scaling.scale, **lengths.window}
        grads = flash_varlen_backward(
            do,
            *inputs,
            *found,
            *lengths.bounds,
            NO_DROPOUT,
            lengths.causal,
            seed,
            unused,
            **settings,
        )
        return QKV(*grads)


class FlashAttn:
    """The kernels of the package flash-attn, from version 2.7 on; they know soft caps too."""

    def forward(self, inputs: QKV, lengths: Lengths, scaling: Scaling) -> Attended:
        """Return the output and the logsumexp."""
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]

        out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(
            *inputs, *lengths.bounds, NO_DROPOUT, scaling.scale, **_settings(lengths, scaling)
        )
        return Attended(out, lse)

    def backward(
        self, do: Tensor, inputs: QKV, found: Attended, lengths: Lengths, scaling: Scaling
    ) -> QKV:
        """Return the gradients."""
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]

        grads = QKV(*map(torch.empty_like, inputs))
        flash_attn_interface._flash_attn_varlen_backward(
            do,
            *inputs,
            *found,
            *grads,
            *lengths.bounds,
            NO_DROPOUT,
            scaling.scale,
            **_settings(lengths, scaling),
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads


def _settings(lengths: Lengths, scaling: Scaling) -> dict[str, Any]:
    return {"causal": lengths.causal, **lengths.window, "softcap": scaling.softcap or 0.0}


def installed() -> Varlen:
    """Return flash-attn's kernels where a version is installed that has them, else torch's own.

    Kernels that were activated in torch come before flash-attn's.
    """
    return FlashAttn() if activated() is None and _has_flash_attn() else TorchVarlen()


def activated() -> str | None:
    """Return the library that torch's flash kernels were told to come from, such as "FA3"."""
    # A release of torch without this function has no registry to activate one in.
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


@functools.cache
def _has_flash_attn() -> bool:
    if importlib.util.find_spec("flash_attn") is None:
        return False
    try:
        version = importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return False
    major, minor = (int(part) for part in version.split(".")[:2])
    # Version 4 is another package that uses the same name.
    return major == 2 and minor >= 7
