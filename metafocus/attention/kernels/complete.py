"""What completes a kernel that has a gradient and no more: Triton's kernels, or tiles."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from metafocus.attention.kernels.kernel import QKV, Attended, Kernel, Scaling, TwiceKernel
from metafocus.attention.kernels.tiled import Tiled
from metafocus.attention.kernels.triton.launch import Triton, unserved
from metafocus.masks.spans import Spans
from metafocus.precision import tf32_products
from metafocus.torch_internals import pytree

BOUND = 8
"""Roundings of the type by which a right kernel may be off, where a wrong one is off by a whole."""

FULL = 64
"""The largest head in full float32, beyond which registers spill by tens of kilobytes."""

TYPES = (torch.float32, torch.bfloat16, torch.float16)

log: logging.Logger = logging.getLogger("metafocus.attention")


def complete(kernel: Kernel, inputs: QKV, scaling: Scaling) -> TwiceKernel:
    """Return the kernel itself if it has second derivatives, else one that has.

    Args:
        kernel: The kernel of the forward pass.
        inputs: Queries, keys and values.
        scaling: The scale and the soft cap of the logits.
    """
    if isinstance(kernel, Tiled | Triton):
        return kernel
    return unfused(inputs, scaling)


def gradient(
    kernel: Kernel,
    do: Tensor,
    dl: Tensor | None,
    inputs: QKV,
    found: Attended,
    spans: Spans,
    scaling: Scaling,
) -> QKV:
    """Return the gradients by a kernel, or by what completes it where the logsumexp is used too.

    Args:
        kernel: The kernel of the forward pass.
        do: Cotangent of the output.
        dl: Cotangent of the logsumexp; None: nothing depends on it.
        inputs: Queries, keys and values.
        found: What the kernel found.
        spans: The intervals, `[B, S]`.
        scaling: The scale and the soft cap of the logits.
    """
    if dl is None:
        return kernel.backward(do, inputs, found, spans, scaling)
    return complete(kernel, inputs, scaling).backward(do, inputs, found, spans, scaling, dl)


def unfused(inputs: QKV, scaling: Scaling) -> TwiceKernel:
    """Return Triton's kernels where they have passed their check on this device, else tiles.

    Args:
        inputs: Queries, keys and values.
        scaling: The scale and the soft cap of the logits.
    """
    reason = unchecked(inputs, scaling)
    log.debug(
        "span_attention %s %s beyond fused kernels: %s",
        tuple(inputs.q.shape),
        inputs.q.dtype,
        "triton" if reason is None else f"tiled, since {reason}",
    )
    return Triton() if reason is None else Tiled()


def unchecked(inputs: QKV, scaling: Scaling) -> str | None:
    """Return why Triton's kernels are not used for tensors like these; None if they are.

    Example:
        >>> x = torch.randn(1, 1, 3, 8)
        >>> unchecked(QKV(x, x, x), Scaling(1.0))
        'the tensors are on cpu'
    """
    q, v = inputs.q, inputs.v
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}"
    if q.dtype not in TYPES:
        return f"the inputs are {q.dtype}, and tensor cores take float32 and half precision"
    sizes, tf32 = (q.shape[-1], v.shape[-1]), tf32_products()
    if q.dtype == torch.float32 and not tf32 and max(sizes) > FULL:
        return f"a head of float32 has size {max(sizes)}, and beyond {FULL} only TF32 is fast"
    return unserved(inputs) or fault(q.device, q.dtype, sizes, scaling.softcap is not None, tf32)


@functools.cache
def fault(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int], capped: bool, tf32: bool
) -> str | None:
    """Return what is wrong with Triton's kernels on a device, or None; looked at once, and logged.

    Triton compiles for the device at hand. So the first use of a kind is a small attention with a
    bidirectional turn, a window, queries without keys and grouped heads, all its derivatives
    against those of tiles.

    Args:
        device: The device of the tensors.
        dtype: The type of the tensors.
        sizes: The sizes of a head of keys and of values.
        capped: Whether logits have a soft cap.
        tf32: Whether float32 products are in TF32, which the kernels are compiled for.
    """
    scaling = Scaling(sizes[0] ** -0.5, 2.0 if capped else None)
    reason = fault_of(Triton(), device, dtype, sizes, scaling)
    kind = f"Triton's attention for {dtype}, heads of {sizes} on {device}"
    if reason is None:
        log.info("%s equals tiles on a small example and is used.", kind)
    else:
        log.warning("%s is not used, tiles are: %s.", kind, reason)
    return reason


def fault_of(
    kernel: TwiceKernel,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    scaling: Scaling,
) -> str | None:
    """Return what is wrong with a kernel on a device, or None; looked at anew at each call.

    Args:
        kernel: The kernel, which is compared with tiles in float64.
        device: The device of the tensors.
        dtype: The type of the tensors.
        sizes: The sizes of a head of keys and of values.
        scaling: The scale and the soft cap of the logits.
    """
    # The example has several blocks of every width, and the last one is not full.
    length = 150
    stop = torch.arange(1, length + 1)
    stop[:70] = 70
    start = torch.zeros(length, dtype=torch.long)
    start[100:] = torch.arange(60, 110)
    stop[90:93] = 0
    spans = Spans(*(x.expand(2, -1).to(device) for x in (start, stop)))
    draw = torch.Generator().manual_seed(0)

    def some(heads: int, *sizes: int) -> Tensor:
        x = torch.randn(2, heads, length, *sizes, generator=draw)
        return x.to(device, dtype if sizes else torch.float32)

    width, values = sizes
    inputs, tangents = (QKV(some(4, width), some(2, width), some(2, values)) for _ in range(2))
    args = inputs, tangents, some(4, values), some(4)
    expected = every_derivative(
        Tiled(), spans, scaling, *pytree.tree_map(torch.Tensor.double, args)
    )
    try:
        got = every_derivative(kernel, spans, scaling, *args)
    except Exception as error:  # A compiler fails in many ways, and tiles serve in each of them.
        return f"it failed on a small example: {type(error).__name__}: {error}"
    rounding = torch.finfo(torch.float16 if dtype == torch.float32 and tf32_products() else dtype)
    for x, y in zip(got, expected, strict=True):
        if not (x - y).norm() <= BOUND * rounding.eps * y.norm():
            return "it is wrong on a small example"
    return None


def every_derivative(
    kernel: TwiceKernel,
    spans: Spans,
    scaling: Scaling,
    inputs: QKV,
    tangents: QKV,
    do: Tensor,
    dl: Tensor,
) -> list[Tensor]:
    """Return all that a kernel computes, what is to be compared with another one's.

    Args:
        kernel: The kernel.
        spans: The keys of each query.
        scaling: The scale and the soft cap of the logits.
        inputs: Queries, keys and values.
        tangents: Their tangents.
        do: Cotangent of the output.
        dl: Cotangent of the logsumexp.
    """
    found = kernel.forward(inputs, spans, scaling)
    known = inputs, found, spans, scaling
    return [
        *found,
        *kernel.backward(do, *known),
        *kernel.backward(do, *known, dl),
        *kernel.forward_mode(inputs, found.lse, tangents, spans, scaling),
        *kernel.double_backward(do, dl, inputs, found, tangents, spans, scaling),
    ]
