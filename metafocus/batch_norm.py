"""Batch norm on the tape: fused kernels for the first derivative, exact ones of every order.

torch's own second derivative is right on the tape, its third is silently wrong (torch 2.13): the
formula holds the saved statistics constant. Written out in pieces every order is right, but each
piece keeps what it needs, almost twice the memory of an unrolled convolutional network. Here the
forward and the first backward pass are torch's kernels, which keep the input alone; derivatives
above are those of the formula, written out when they are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafocus import operators
from metafocus.autodiff import pullback
from metafocus.levels import transforming


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
    """Normalise over all axes but the second, like `F.batch_norm`."""
    single = input.dtype in (torch.float32, torch.float64)
    alike = all(x is None or x.dtype == input.dtype for x in (weight, bias, running_mean))
    if not (training and single and alike) or transforming():
        return operators.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    return _Norm.apply(input, weight, bias, (running_mean, running_var, True, momentum, eps))


def _derivative(
    g: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivative of `<g, norm(x)>` by `x`, `weight` and `bias`."""
    axes = [0, *range(2, x.ndim)]
    size = x.numel() // x.shape[1]
    x = x - x.mean(axes, keepdim=True)
    scale = torch.rsqrt((x * x).mean(axes, keepdim=True) + eps)
    x = x * scale
    by_bias = g.sum(axes, keepdim=True)
    by_weight = (g * x).sum(axes, keepdim=True)
    if weight is not None:
        scale = scale * weight.reshape(by_bias.shape)
    by_x = scale * (g - by_bias / size - x * (by_weight / size))
    return by_x, by_weight.flatten(), by_bias.flatten()


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
    """The backward pass of `_Norm`; `mean` and `scale` are for its kernel alone."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Any, mean: Tensor, scale: Tensor, eps: float
    ) -> Any:
        ctx.save_for_backward(g, x, weight)
        ctx.eps = eps
        return torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, scale, True, eps, [True, True, True]
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        g, x, weight = ctx.saved_tensors
        if weight is None:
            by_g, by_x = pullback(
                lambda g, x: _derivative(g, x, None, ctx.eps),
                (g, x),
                cotangents,
                ctx.needs_input_grad[:2],
            )
            return by_g, by_x, None, None, None, None
        found = pullback(
            lambda g, x, weight: _derivative(g, x, weight, ctx.eps),
            (g, x, weight),
            cotangents,
            ctx.needs_input_grad[:3],
        )
        return *found, None, None, None
