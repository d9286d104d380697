"""Attention inside `torch.compile`: an operator that the compiler does not look into.

What a kernel does depends on the values of the spans, which a compiler cannot trace. The operator
is differentiable once: `torch.compile` has no double backward. A function transform inside
compiled code (`torch.func.grad`, `jvp`, `vmap`) would not see the operator's derivative, and
forward mode would take it for a constant; there attention is dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafocus.attention.kernels.auto import KERNELS
from metafocus.attention.kernels.complete import gradient
from metafocus.attention.kernels.dense import dense
from metafocus.attention.kernels.kernel import QKV, Attended, Scaling
from metafocus.errors import TransformError
from metafocus.masks.spans import Spans
from metafocus.precision import wide_type
from metafocus.torch_internals import transform_active


def attention_operator(
    inputs: QKV, spans: Spans, scaling: Scaling, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the output and the logsumexp of each row, by one opaque operator.

    Raises:
        TransformError: Inside a transform, for another back end than "auto", which is dense there.
    """
    if transform_active():
        if backend != "auto":
            raise TransformError(
                f"span_attention(backend={backend!r}) inside a function transform that is being "
                'compiled: use backend="auto" or "dense", or compile without the transform.'
            )
        return dense(inputs, spans, scaling)
    return _attention(*inputs, *spans, scaling.scale, scaling.softcap, backend)


@torch.library.custom_op("metafocus::span_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    stop: Tensor,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    scaling = Scaling(scale, softcap)
    out, lse = KERNELS[backend]().forward(QKV(q, k, v), Spans(start, stop), scaling)
    return out.contiguous(), lse.contiguous()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(
        q.shape[:-1], dtype=wide_type(q.dtype)
    )


@torch.library.custom_op("metafocus::span_attention_backward", mutates_args=())
def _gradient(
    do: Tensor,
    dl: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    stop: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rest = QKV(q, k, v), Attended(o, lse), Spans(start, stop), Scaling(scale, softcap)
    dq, dk, dv = (x.contiguous() for x in gradient(KERNELS[backend](), do, dl, *rest))
    return dq, dk, dv


@_gradient.register_fake
def _(
    do: Tensor,
    dl: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, ctx.softcap, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, do: Tensor | None, dl: Tensor | None) -> Any:
    if do is None:
        do = torch.zeros_like(ctx.saved_tensors[5])
    grads = _gradient(do, dl, *ctx.saved_tensors, ctx.scale, ctx.softcap, ctx.backend)
    return *grads, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_save)
