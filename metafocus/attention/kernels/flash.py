"""Fused attention without masks: spans are cut into runs of queries that flash kernels serve."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metafocus.attention.kernels import flash_cpu, flash_cuda
from metafocus.attention.kernels.flash_dense import CuDNN, Fastest, device_seconds
from metafocus.attention.kernels.kernel import QKV, Attended, Scaling
from metafocus.attention.kernels.query_runs import QueryRun, find_query_runs, same, versions
from metafocus.attention.kernels.tiled import Tiled
from metafocus.attention.kernels.varlen import FlashAttn, Varlen, activated, installed
from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans

CPU_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CUDA_TYPES = (torch.bfloat16, torch.float16)
LONG = 1024
"""Tokens for each slice, below which slices are not tried."""
LITTLE_SHARED_MEMORY = {(8, 6), (8, 9), (12, 0), (12, 1)}
"""Devices whose shared memory does not hold the gradient of a head larger than 192."""


class Known(NamedTuple):
    """Turns, and the memory they were read from, with the state it was in."""

    spans: Spans
    versions: tuple[int | None, ...]
    runs: tuple[QueryRun, ...]

    def of(self, spans: Spans) -> bool:
        """Return whether these are the same numbers in the same memory, not changed since."""
        return same(spans, self.spans, self.versions)


@dataclass(frozen=True)
class Flash:
    """Attention by fused kernels: first derivatives, `O(S)` memory, no mask in any form.

    Any spans are served exactly, in the worst case by one call or copy of keys per query, which is
    slow: `prepare` says so. It also makes a kernel that has found the runs already; one without
    finds them at each call, which on CUDA waits for the device.

    Attributes:
        known: Spans and their runs.
    """

    known: Known | None = None

    def forward(self, inputs: QKV, spans: Spans, scaling: Scaling) -> Attended:
        """Return the output and the logsumexp of each row; see `Kernel`.

        Raises:
            ProblemError: If the kernels of this device cannot serve the arguments.
        """
        return _forward(inputs, self._runs_of(inputs, spans, scaling), scaling)

    def backward(
        self, do: Tensor, inputs: QKV, found: Attended, spans: Spans, scaling: Scaling
    ) -> QKV:
        """Return the gradients of `<do, output>`; see `Kernel`.

        Raises:
            ProblemError: If the kernels of this device cannot serve the arguments.
        """
        return _backward(do, inputs, found, self._runs_of(inputs, spans, scaling), scaling)

    def _runs_of(self, inputs: QKV, spans: Spans, scaling: Scaling) -> tuple[QueryRun, ...]:
        reason = unserved(inputs, scaling)
        if reason is not None:
            raise ProblemError(
                f'backend="flash" cannot serve this call: {reason}. Use backend="auto" or "tiled"'
            )
        if self.known is not None and self.known.of(spans):
            return self.known.runs
        return find_query_runs(spans)

    @property
    def runs(self) -> tuple[QueryRun, ...]:
        """The runs found by `prepare`; none without it."""
        return () if self.known is None else self.known.runs


def _forward(inputs: QKV, runs: tuple[QueryRun, ...], scaling: Scaling) -> Attended:
    if not inputs.q.is_cuda:
        return flash_cpu.forward(inputs, runs, scaling.scale)
    if by_slices(inputs, runs, scaling):
        return flash_cpu.forward(inputs, runs, scaling.scale, CuDNN())
    return flash_cuda.forward(inputs, runs, scaling, installed())


def _backward(
    do: Tensor, inputs: QKV, found: Attended, runs: tuple[QueryRun, ...], scaling: Scaling
) -> QKV:
    if not do.is_cuda:
        return flash_cpu.backward(do, inputs, found, runs, scaling.scale)
    if by_slices(inputs, runs, scaling):
        return flash_cpu.backward(do, inputs, found, runs, scaling.scale, CuDNN())
    return flash_cuda.backward(do, inputs, found, runs, scaling, installed())


_FASTEST = Fastest(device_seconds)


def by_slices(inputs: QKV, runs: tuple[QueryRun, ...], scaling: Scaling) -> bool:
    """Return whether cuDNN on slices of a batch serves it faster than variable-length kernels.

    That pays for few long turns: each slice costs a call, but no keys are copied. Measured by
    forward passes at the first use of each size, on this device; at most one slice per 1,024
    tokens is tried.

    Args:
        inputs: Queries, keys and values, on a GPU.
        runs: The runs of the batch.
        scaling: The scale and the soft cap of the logits.
    """
    q, k, _ = inputs
    calls = sum(len(group.pieces) for group in flash_cpu.groups(runs))
    tokens = q.shape[0] * q.shape[2]
    if scaling.softcap is not None or calls * LONG > tokens:
        return False
    if torch.cuda.is_current_stream_capturing() or fault(q.device, q.dtype, q.shape[-1], True):
        return False
    heads = q.shape[1], k.shape[1], q.shape[3]
    key = q.device, q.dtype, heads, tokens.bit_length(), calls.bit_length(), activated()
    ways = (
        lambda: flash_cuda.forward(inputs, runs, scaling, installed()),
        lambda: flash_cpu.forward(inputs, runs, scaling.scale, CuDNN()),
    )
    return _FASTEST(key, ways) == 1


def prepare(inputs: QKV, spans: Spans, scaling: Scaling) -> Flash | str:
    """Return a kernel that has found the runs of `spans`, or why tiles should serve them.

    That is where fused kernels cannot, and where they would need so many runs that tiles are as
    fast; see `run_limit`.

    Args:
        inputs: Queries, keys and values.
        spans: The keys of each query, `[B, S]`.
        scaling: The scale and the soft cap of the logits.

    Returns:
        The kernel; or half a sentence for an error text or a log line.

    Example:
        >>> x = torch.randn(1, 1, 3, 8)
        >>> spans = Spans(torch.zeros(1, 3).long(), torch.tensor([[1, 2, 3]]))
        >>> isinstance(prepare(QKV(x, x, x), spans, Scaling(1.0)), Flash)
        True
        >>> prepare(QKV(x, x, x[..., :4]), spans, Scaling(1.0))
        'values have head size 4 and keys 8, and fused kernels want one'
    """
    reason = unserved(inputs, scaling)
    if reason is not None:
        return reason
    q = inputs.q
    batch, length = spans.start.shape
    most = run_limit(batch, length, q.device.type)
    runs = find_query_runs(spans, most)
    if runs is None:
        return (
            f"the spans need more than {most} runs ({batch} rows of {length} tokens), of which "
            "each costs a call or a copy of its keys"
        )
    if q.is_cuda:
        found = fault(q.device, q.dtype, q.shape[-1])
        if found is not None:
            return found
    else:
        calls = sum(len(group.pieces) for group in flash_cpu.groups(runs))
        if calls > most:
            return f"the spans need {calls} calls of the kernel, more than {most}"
    return Flash(Known(spans, versions(spans), runs))


def fault(device: torch.device, dtype: torch.dtype, size: int, slices: bool = False) -> str | None:
    """Return what is wrong with the fused kernels of a device, or None; looked at once.

    Kernels come with the installation, or are activated later. So the first use of one is a small
    attention of runs, windows and grouped heads, with its gradient, against tiles.

    Args:
        device: The device of the tensors.
        dtype: The type of the tensors.
        size: The size of a head.
        slices: Whether cuDNN's kernels are looked at instead of the variable-length ones.
    """
    return _fault(device, dtype, size, slices, activated())


@functools.cache
def _fault(
    device: torch.device, dtype: torch.dtype, size: int, slices: bool, library: str | None
) -> str | None:
    length = 40
    stop = torch.arange(1, length + 1)
    stop[:16] = 16
    start = torch.zeros(length, dtype=torch.long)
    start[30:] = torch.arange(10)
    spans = Spans(start[None].to(device), stop[None].to(device))
    draw = torch.Generator().manual_seed(0)
    do, *tensors = (
        torch.randn(1, heads, length, size, generator=draw).to(device, dtype)
        for heads in (4, 4, 2, 2)
    )
    inputs = QKV(*tensors)
    scaling, runs = Scaling(size**-0.5), find_query_runs(spans)
    assert runs is not None
    expected = Tiled().forward(inputs, spans, scaling)
    exact = Tiled().backward(do, inputs, expected, spans, scaling)
    try:
        if slices:
            found = flash_cpu.forward(inputs, runs, scaling.scale, CuDNN())
            grads = flash_cpu.backward(do, inputs, found, runs, scaling.scale, CuDNN())
        else:
            found = _forward(inputs, runs, scaling)
            grads = _backward(do, inputs, found, runs, scaling)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"the fused kernels of {device} failed on a small example: {error}"
    for got, want in zip((*found, *grads), (*expected, *exact), strict=True):
        # The bound allows some ten roundings; a wrong kernel is off by as much as its result.
        if not (got - want).float().norm() <= 32 * torch.finfo(dtype).eps * want.float().norm():
            return f"the fused kernels of {device} are wrong on a small example of {dtype}"
    return None


def unserved(inputs: QKV, scaling: Scaling) -> str | None:
    """Return why no fused kernel can serve tensors like these, whatever the spans; None if one can.

    Args:
        inputs: Queries, keys and values.
        scaling: The scale and the soft cap of the logits.

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

    Args:
        batch: Rows of the batch.
        length: Tokens of a row.
        device: Type of the device.

    Example:
        >>> run_limit(2, 1024, "cpu")
        204
    """
    # The limit grows with the rows, so that vmap, which repeats them, changes no choice.
    return batch * max(16, length // (10 if device == "cpu" else 32))
