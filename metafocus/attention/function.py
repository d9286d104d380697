"""Attention as an autograd Function: any kernel below, exact derivatives up to the second order.

The fused kernels have a gradient and no more. Here the gradient is an operation of its own, whose
derivatives, like forward mode, are computed tile by tile, in torch or in Triton, from what the
kernel has saved. So the order of differentiation need not be known when the forward pass chooses a
kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus.attention.kernels.complete import complete, gradient
from metafocus.attention.kernels.kernel import QKV, Attended, Kernel, Scaling
from metafocus.errors import TransformError
from metafocus.masks.spans import Spans
from metafocus.precision import no_autocast
from metafocus.torch_internals import is_view, refuse_nested_forward_mode, unwrap_dead


class Call(NamedTuple):
    """What needs no derivative: the kernel and how logits come from products."""

    kernel: Kernel
    scaling: Scaling


def _own(x: Tensor) -> Tensor:
    """Return the same memory, no longer as a view.

    A plain dual tensor that is a view refuses a tangent with other strides.
    """
    return x.data if is_view(x) else x


def _folded(cls: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """Run a Function under vmap by folding the mapped axis into the batch."""
    size = info.batch_size

    def fold(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    outputs = cls.apply(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
    return tuple(y.unflatten(0, (size, -1)) for y in outputs), (0,) * len(outputs)


def _save(ctx: Any, call: Call, tensors: tuple[Any, ...]) -> None:
    ctx.call = call
    ctx.set_materialize_grads(False)
    # Both share one tuple, because grad(vmap) fails otherwise.
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _saved(ctx: Any) -> list[Any]:
    return [None if x is None else unwrap_dead([x])[0] for x in ctx.saved_tensors]


def _zeros(given: tuple[Any, ...], like: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.zeros_like(y) if x is None else x for x, y in zip(given, like, strict=True)]


class Attention(torch.autograd.Function):
    """`(q, k, v, start, stop) -> (o, lse)`."""

    @staticmethod
    def forward(
        call: Call, q: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the kernel."""
        with no_autocast(q.device):
            out, lse = call.kernel.forward(QKV(q, k, v), Spans(start, stop), call.scaling)
        return _own(out), _own(lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep inputs and outputs, and nothing else."""
        _save(ctx, inputs[0], (*inputs[1:], *output))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        """Return the gradient, itself differentiable."""
        do, dl = cotangents
        if do is None and dl is None:
            return (None,) * 6
        saved = _saved(ctx)
        if do is None:
            do = torch.zeros_like(saved[5])
        return None, *_Backward.apply(ctx.call, *saved, do, dl), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Return the tangents of both outputs."""
        refuse_nested_forward_mode("span_attention")
        saved = _saved(ctx)
        along = _zeros(tangents[1:4], tuple(saved[:3]))
        return _ForwardMode.apply(ctx.call, *saved, *along)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Fold the mapped axis into the batch."""
        return _folded(Attention, info, in_dims, args)


class _Backward(torch.autograd.Function):
    """`(q, k, v, start, stop, o, lse, do, dl) -> (dq, dk, dv)`.

    `o` and `lse` are functions of the inputs: the derivatives with respect to these are total.
    """

    @staticmethod
    def forward(
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor,
        stop: Tensor,
        o: Tensor,
        lse: Tensor,
        do: Tensor,
        dl: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rest = QKV(q, k, v), Attended(o, lse), Spans(start, stop), call.scaling
        with no_autocast(q.device):
            grads = gradient(call.kernel, do, dl, *rest)
        dq, dk, dv = (_own(x) for x in grads)
        return dq, dk, dv

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, inputs[0], inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if all(x is None for x in cotangents):
            return (None,) * 10
        saved = _saved(ctx)
        along = _zeros(cotangents, tuple(saved[:3]))
        rdo, rdl, *rest = _DoubleBackward.apply(ctx.call, *saved, *along)
        return None, *rest, None, None, None, None, rdo, None if saved[8] is None else rdl

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_nested_forward_mode("span_attention")
        saved = _saved(ctx)
        along = _zeros(tangents[1:4], tuple(saved[:3]))
        _, _, *out = _DoubleBackward.apply(ctx.call, *saved, *along)
        tdo, tdl = tangents[8:]
        if tdo is None and tdl is None:
            return tuple(out)
        if tdo is None:
            tdo = torch.zeros_like(saved[7])
        more = _Backward.apply(ctx.call, *saved[:7], tdo, tdl)
        return tuple(a + b for a, b in zip(out, more, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _folded(_Backward, info, in_dims, args)


class _ForwardMode(torch.autograd.Function):
    """`(q, k, v, start, stop, o, lse, tq, tk, tv) -> (to, tlse)`."""

    @staticmethod
    def forward(call: Call, *args: Tensor) -> tuple[Tensor, ...]:
        q, k, v, start, stop, _, lse, tq, tk, tv = args
        with no_autocast(q.device):
            inputs, rest = QKV(q, k, v), (QKV(tq, tk, tv), Spans(start, stop), call.scaling)
            kernel = complete(call.kernel, inputs, call.scaling)
            return tuple(kernel.forward_mode(inputs, lse, *rest))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, inputs[0], inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        do, dl = cotangents
        if do is None and dl is None:
            return (None,) * 11
        *saved, tq, tk, tv = _saved(ctx)
        if do is None:
            do = torch.zeros_like(saved[5])
        _, _, *through = _DoubleBackward.apply(ctx.call, *saved, do, dl, tq, tk, tv)
        by_tangents = _Backward.apply(ctx.call, *saved, do, dl)
        return None, *through, None, None, None, None, *by_tangents

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _third_order()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _folded(_ForwardMode, info, in_dims, args)


class _DoubleBackward(torch.autograd.Function):
    """`(q, k, v, start, stop, o, lse, do, dl, tq, tk, tv) -> (rdo, rdl, rq, rk, rv)`."""

    @staticmethod
    def forward(call: Call, *args: Any) -> tuple[Tensor, ...]:
        q, k, v, start, stop, o, lse, do, dl, tq, tk, tv = args
        with no_autocast(q.device):
            inputs, rest = QKV(q, k, v), (QKV(tq, tk, tv), Spans(start, stop), call.scaling)
            kernel = complete(call.kernel, inputs, call.scaling)
            return kernel.double_backward(do, dl, inputs, Attended(o, lse), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        _third_order()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _third_order()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _folded(_DoubleBackward, info, in_dims, args)


def _third_order() -> Any:
    raise TransformError(
        "span_attention has derivatives up to the second order, and a third is asked for. Use "
        'backend="dense" (in Hugging Face models attn_implementation="metafocus_dense"), which '
        "has all of them and takes memory quadratic in the length."
    )
