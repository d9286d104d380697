"""Which tensors fused kernels serve, and up to how many runs they are worth it."""

from __future__ import annotations

import torch

from metafocus.attention.kernels.kernel import QKV, Scaling
from metafocus.attention.kernels.varlen import FlashAttn, Varlen, installed

CPU_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CUDA_TYPES = (torch.bfloat16, torch.float16)
LITTLE_SHARED_MEMORY = {(8, 6), (8, 9), (12, 0), (12, 1)}
"""Devices whose shared memory does not hold the gradient of a head larger than 192."""


def unserved(inputs: QKV, scaling: Scaling) -> str | None:
    """Return why no fused kernel can serve tensors like these, whatever the spans; None if one can.

    Example:
        >>> x = torch.randn(1, 1, 3, 8)
        >>> unserved(QKV(x, x, x), Scaling(1.0, softcap=30.0))
        'softcap=30.0, and only flash-attn (2.7 or later) on CUDA has soft caps'
    """
    q, k, v = inputs
    device = q.device.type
    if device not in ("cpu", "cuda"):
        return f"the tensors are on {device}, and there are fused kernels for cpu and cuda"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k, v are of types {q.dtype}, {k.dtype}, {v.dtype}, and kernels want one"
    if v.shape[-1] != k.shape[-1]:
        return (
            f"values have head size {v.shape[-1]} and keys {k.shape[-1]}, "
            "and fused kernels want one"
        )
    varlen = installed() if device == "cuda" else None
    if scaling.softcap is not None and not isinstance(varlen, FlashAttn):
        return (
            f"softcap={scaling.softcap}, and only flash-attn (2.7 or later) on CUDA has soft caps"
        )
    if varlen is None:
        return None if q.dtype in CPU_TYPES else f"the CPU kernel has no {q.dtype}"
    return _unserved_on_cuda(
        q.dtype, q.shape[-1], torch.cuda.get_device_capability(q.device), varlen
    )


def _unserved_on_cuda(
    dtype: torch.dtype, size: int, capability: tuple[int, int], varlen: Varlen
) -> str | None:
    if dtype not in CUDA_TYPES:
        return f"the inputs are {dtype}, and CUDA kernels take bfloat16 and float16"
    if size % 8 or size > 256:
        return f"the head size is {size}, and CUDA kernels take multiples of 8 up to 256"
    if capability < (8, 0):
        return f"the device has compute capability {capability}, and the kernels need (8, 0)"
    if size > 192 and capability in LITTLE_SHARED_MEMORY:
        return f"the head size is {size}, and the gradient on this device takes at most 192"
    if not isinstance(varlen, FlashAttn) and not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no flash kernels and flash-attn is not installed"
    return None


def run_limit(batch: int, length: int, device: str) -> int:
    """Return up to how many runs, on the CPU up to how many calls, fused kernels are used.

    On the CPU each call costs some 0.06 ms forward and 0.2 ms with the gradient beside its
    arithmetic. Measured at S = 1024 and 4096, with 8 heads of 64 and 2 heads of 32, tiles are as
    fast at one call per 8 to 11 tokens. On CUDA the bound is a guess: a block of the
    kernel has 64 to 128 queries, and shorter runs leave it empty.

    Example:
        >>> run_limit(2, 1024, "cpu")
        204
    """
    # The limit grows with the rows, so that vmap, which repeats them, changes no choice.
    return batch * max(16, length // (10 if device == "cpu" else 32))
