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
from metafocus.attention.kernels.served import run_limit, unserved
from metafocus.attention.kernels.tiled import Tiled
from metafocus.attention.kernels.varlen import activated, installed
from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans

LONG = 1024
"""Tokens for each slice, below which slices are not tried."""


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
