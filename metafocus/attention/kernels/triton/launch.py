"""Triton's kernels as one with all derivatives to the second order; triton is imported on use."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus.attention.kernels.kernel import QKV, Attended, Scaling
from metafocus.attention.kernels.triton.span_blocks import Blocks, blocks_of
from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans
from metafocus.precision import tf32_products, wide, wide_type

LARGEST = 256
"""The largest size of a head: a program holds several blocks of whole rows."""


@dataclass(frozen=True)
class Triton:
    """Attention with the gradient, second derivative and forward mode in Triton; see `TwiceKernel`.

    Products of bfloat16 inputs are of bfloat16 and those of float16 inputs in TF32. Those of
    float32 are in TF32 where `torch.backends.cuda.matmul.fp32_precision` says so, else each is made
    of three in TF32, which is exact to some roundings of float32. All sums are in float32, or in
    float64 for float64 inputs.

    Attributes:
        side: Queries, and keys, of a block; a power of two, at least 16. None: by the size of a
            head and the type.
        warps: Warps of a program. None: by the size of a head.
        stages: Blocks that are loaded ahead.
    """

    side: int | None = None
    warps: int | None = None
    stages: int = 2

    def forward(self, inputs: QKV, spans: Spans, scaling: Scaling) -> Attended:
        """Return the output and the logsumexp of each row; see `Kernel`.

        Raises:
            ProblemError: If a span reaches beyond the keys, or the kernels cannot serve the inputs.
        """
        reason = unserved(inputs)
        if reason is not None:
            raise ProblemError(
                f'backend="triton" cannot serve this call: {reason}. Use backend="auto" or "tiled".'
            )
        from metafocus.attention.kernels.triton import gradient

        length = spans.start.shape[-1]
        beyond = (spans.start < spans.stop) & ((spans.start < 0) | (spans.stop > length))
        if beyond.any():
            row, query = beyond.nonzero()[0].tolist()
            raise ProblemError(
                f"the span of query {query} in row {row} reaches beyond the {length} keys; an "
                "interval is start <= key < stop within [0, S)."
            )
        at = _Launch.of(self, inputs, spans, scaling)
        out, lse = at.like(inputs.q, inputs.v.shape[-1]), at.sums()
        at.by_queries(gradient.attend, *at.inputs, *at.spans_by_keys, out, lse)
        return Attended(out, lse)

    def backward(
        self,
        do: Tensor,
        inputs: QKV,
        found: Attended,
        spans: Spans,
        scaling: Scaling,
        dl: Tensor | None = None,
    ) -> QKV:
        """Return the gradients of `<do, output> + <dl, lse>`; see `TwiceKernel`."""
        from metafocus.attention.kernels.triton import gradient

        at = _Launch.of(self, inputs, spans, scaling)
        known = (*at.inputs, do.contiguous(), found.lse.contiguous(), offset(do, found.o, dl))
        dq, dk, dv = (torch.empty_like(x) for x in at.inputs)
        at.by_queries(gradient.query_gradient, *known, *at.spans_by_keys, dq)
        at.by_keys(gradient.key_gradient, *known, *at.spans_by_queries, dk, dv)
        return QKV(dq, dk, dv)

    def forward_mode(
        self, inputs: QKV, lse: Tensor, tangents: QKV, spans: Spans, scaling: Scaling
    ) -> Attended:
        """Return the tangents of the output and of the logsumexp; see `TwiceKernel`."""
        from metafocus.attention.kernels.triton import double_backward

        at = _Launch.of(self, inputs, spans, scaling)
        along = (x.contiguous() for x in tangents)
        known = (*at.inputs, *along, None, lse.contiguous(), None)
        out, mu = at.like(inputs.q, inputs.v.shape[-1]), at.sums()
        at.by_queries(double_backward.row_sums, *known, *at.spans_by_keys, mu, None)
        at.by_queries(double_backward.query_second, *known, mu, None, *at.spans_by_keys, out, None)
        return Attended(out, mu)

    def double_backward(
        self,
        do: Tensor,
        dl: Tensor | None,
        inputs: QKV,
        found: Attended,
        tangents: QKV,
        spans: Spans,
        scaling: Scaling,
    ) -> tuple[Tensor, ...]:
        """Return the gradients of `<(dq, dk, dv), tangents>`; see `TwiceKernel`."""
        from metafocus.attention.kernels.triton import double_backward

        at = _Launch.of(self, inputs, spans, scaling)
        along = (x.contiguous() for x in tangents)
        rows = (do.contiguous(), found.lse.contiguous(), offset(do, found.o, dl))
        known = (*at.inputs, *along, *rows)
        ot, mu, c = at.like(do, do.shape[-1]), at.sums(), at.sums()
        rq, rk, rv = (torch.empty_like(x) for x in at.inputs)
        at.by_queries(double_backward.row_sums, *known, *at.spans_by_keys, mu, c)
        at.by_queries(double_backward.query_second, *known, mu, c, *at.spans_by_keys, ot, rq)
        at.by_keys(double_backward.key_second, *known, mu, c, *at.spans_by_queries, rk, rv)
        return ot, mu, rq, rk, rv


def unserved(inputs: QKV) -> str | None:
    """Return why the kernels cannot serve inputs like these, wherever they run; None if they can.

    Example:
        >>> x = torch.randn(1, 1, 3, 512)
        >>> unserved(QKV(x, x, x))
        "a head has size 512, and Triton's kernels take at most 256"
    """
    largest = max(inputs.q.shape[-1], inputs.v.shape[-1])
    if largest > LARGEST:
        return f"a head has size {largest}, and Triton's kernels take at most {LARGEST}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from triton import knobs  # pyright: ignore[reportMissingImports]

    if inputs.q.device.type != "cuda" and not knobs.runtime.interpret:
        return f"the tensors are on {inputs.q.device.type}, and Triton's kernels need cuda"
    return None


def offset(do: Tensor, o: Tensor, dl: Tensor | None) -> Tensor:
    """Return `E = rowsum(do o) - dl`, dense."""
    e = (wide(do) * wide(o)).sum(-1)
    return (e if dl is None else e - dl).contiguous()


def side_of(dtype: torch.dtype, width: int) -> int:
    """Return the width of a block, such that registers and shared memory hold what a program needs.

    By what the compiler reports for compute capability 9.0; no width has been timed, which
    `benchmarks/attention_hvp.py --sides 32,64,128` does.

    Args:
        dtype: Type of the inputs.
        width: The larger of the sizes of a head of keys and of values.
    """
    if dtype == torch.bfloat16:
        return 64 if width <= 128 else 32
    return 64 if width <= 64 and (dtype == torch.float16 or tf32_products()) else 32


def constants_of(kernel: Triton, inputs: QKV, scaling: Scaling) -> dict[str, Any]:
    """Return what every kernel is compiled for; `tile.py` says what the names mean.

    Args:
        kernel: Sizes that were chosen by hand.
        inputs: Queries, keys and values.
        scaling: The scale and the soft cap of the logits.
    """
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
    from triton import knobs  # pyright: ignore[reportMissingImports]

    q, k, v = inputs
    width, values = q.shape[-1], v.shape[-1]
    low = {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        # Weights of float16 would overflow: TF32 has as many digits and the range of float32.
        torch.float16: tl.float32,
        torch.bfloat16: tl.bfloat16,
    }[q.dtype]
    # The interpreter multiplies the bits of bfloat16 as integers.
    interpreted = knobs.runtime.interpret and low == tl.bfloat16
    return {
        "G": q.shape[1] // k.shape[1],
        "D": width,
        "DV": values,
        "BD": max(16, triton.next_power_of_2(width)),
        "BDV": max(16, triton.next_power_of_2(values)),
        "SIDE": kernel.side or side_of(q.dtype, max(width, values)),
        "SCALE": scaling.scale,
        "CAP": scaling.softcap,
        "SUM": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "LOW": low,
        "PRODUCT": tl.float32 if interpreted else low,
        # Without tensor cores ("ieee"), registers would spill by tens of kilobytes.
        "PRECISION": "tf32" if q.dtype == torch.float16 or tf32_products() else "tf32x3",
        "num_warps": kernel.warps or (4 if max(width, values) <= 64 else 8),
        "num_stages": kernel.stages,
    }


@dataclass(frozen=True)
class _Launch:
    """Dense inputs, spans in blocks, and the constants that every kernel is compiled for."""

    inputs: QKV
    blocks: Blocks
    batch: int
    constants: dict[str, Any]

    @classmethod
    def of(cls, kernel: Triton, inputs: QKV, spans: Spans, scaling: Scaling) -> _Launch:
        constants = constants_of(kernel, inputs, scaling)
        dense = QKV(*(x.contiguous() for x in inputs))
        return cls(dense, blocks_of(spans, constants["SIDE"]), inputs.q.shape[0], constants)

    @property
    def spans_by_keys(self) -> tuple[Tensor, ...]:
        """Spans, and for each block of queries its keys."""
        return self.blocks[:4]

    @property
    def spans_by_queries(self) -> tuple[Tensor, ...]:
        """Spans, and for each block of keys its queries."""
        return self.blocks[:2] + self.blocks[4:]

    def like(self, x: Tensor, width: int) -> Tensor:
        """Make room for rows `[B, H, S, width]` in the type of `x`."""
        return x.new_empty(*self.inputs.q.shape[:-1], width)

    def sums(self) -> Tensor:
        """Make room for one number a row."""
        q = self.inputs.q
        return q.new_empty(q.shape[:-1], dtype=wide_type(q.dtype))

    def by_queries(self, kernel: Any, *args: Any) -> None:
        """Run one program for each block of queries of each head."""
        self._run(kernel, self.inputs.q.shape[1], args)

    def by_keys(self, kernel: Any, *args: Any) -> None:
        """Run one program for each block of keys of each key head."""
        self._run(kernel, self.inputs.k.shape[1], args)

    def _run(self, kernel: Any, heads: int, args: tuple[Any, ...]) -> None:
        q = self.inputs.q
        blocks = self.blocks.low_key.shape[-1]
        programs = blocks * heads * self.batch
        if not programs:
            return
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(q):
            kernel[(programs,)](*args, q.shape[2], q.shape[1], blocks, **self.constants)
