"""Batch norm on the tape: fused kernels for the first derivative, exact ones of every order.

torch's own second derivative is right on the tape, its third is silently wrong (torch 2.13): the
formula holds the saved statistics constant. Written out in pieces every order is right, but each
piece keeps what it needs, almost twice the memory of an unrolled convolutional network. Here the
forward and the first backward pass are torch's kernels, which keep the input alone; the second is
written out when it is asked for, so that the orders above are its own derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafocus.autodiff.safe_operators import norms
from metafocus.torch_internals import transforming


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Normalise over all axes but the second, like `F.batch_norm`; running statistics stay."""
    single = input.dtype in (torch.float32, torch.float64)
    alike = all(x is None or x.dtype == input.dtype for x in (weight, bias, running_mean))
    if not (training and single and alike) or transforming():
        return norms.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    axes = [0, *range(2, input.ndim)]
    # The kernel below looks at no shape: a weight too short is read beyond its end.
    norms.check_channels(input, running_mean, running_var, weight, bias, True, axes)
    return _Norm.apply(input, weight, bias, (None, None, True, momentum, eps))


def _second(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    moments: tuple[Tensor, Tensor] | None,
    eps: float,
    cotangents: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives of a backward pass by `g`, `x` and `weight`.

    With `y = (x - mean) s` and sums over what a channel is normalised over, the backward pass is
    `s w (g - sum(g) / n - y sum(g y) / n)`, `sum(g y)` and `sum(g)`.

    Args:
        g: its cotangent.
        x: the input.
        weight: the weight of the norm.
        moments: mean and `s` of `x` as constants; None: computed here, to be differentiated.
        eps: the `eps` of the norm.
        cotangents: the cotangents of its results.
    """
    u, by_weight, by_bias = cotangents
    axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
    n = x.numel() // x.shape[1]

    def total(t: Tensor) -> Tensor:
        return t.sum(axes, keepdim=True)

    if moments is None:
        y = x - total(x) / n
        s = torch.rsqrt(total(y * y) / n + eps)
    else:
        y, s = x - moments[0].reshape(shape), moments[1].reshape(shape)
    y = y * s
    p, q = by_weight.reshape(shape), by_bias.reshape(shape)
    w = s if weight is None else s * weight.reshape(shape)
    sum_g, sum_u, sum_gy, sum_uy = total(g), total(u), total(g * y), total(u * y)
    inner = total(u * g) - (sum_g * sum_u + sum_gy * sum_uy) / n
    by_g = u * w + y * (p - w * sum_uy / n) + (q - w * sum_u / n)
    # The derivative by y is g a + u b; then that of y and of s by x.
    a, b = p - w * sum_uy / n, -w * sum_gy / n
    mean = (a * sum_g + b * sum_u) / n
    slope = (a * sum_gy + b * sum_uy + w * inner) / n
    by_x = (g * a + u * b - mean - y * slope) * s
    return by_g, by_x, (s * inner).flatten()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, settings: tuple[Any, ...]) -> Tensor:
        y, mean, scale = torch.native_batch_norm(x, weight, bias, *settings)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = settings[-1]
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        by_x, by_weight, by_bias = _Pull.apply(cotangents[0], x, weight, mean, scale, ctx.eps)
        _, wanted, also, _ = ctx.needs_input_grad
        return by_x, by_weight if wanted else None, by_bias if also else None, None


class _Pull(torch.autograd.Function):
    """The backward pass of `_Norm`; `mean` and `scale` are constants here, functions of `x`."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Any, mean: Tensor, scale: Tensor, eps: float
    ) -> Any:
        ctx.save_for_backward(g, x, weight, mean, scale)
        ctx.eps = eps
        return torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, scale, True, eps, [True, True, True]
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        g, x, weight, *moments = ctx.saved_tensors
        constant = None if torch.is_grad_enabled() else (moments[0], moments[1])
        found = _second(g, x, weight, constant, ctx.eps, cotangents)
        return *found[:2], None if weight is None else found[2], None, None, None
