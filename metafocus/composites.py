"""Operators whose fused kernels lack a derivative that an estimator needs, as exact composites.

One scoped mechanism: `differentiable_twice(loss)` evaluates a loss with the operators of the
table swapped, each only where the fused kernel would fail or, worse, be silently wrong:

* attention: no fused kernel has a double backward or forward mode;
* batch and instance norm: wrong under `vmap` inside a gradient of a gradient (torch 2.13);
* silu, mish, group norm, mse and huber loss: no forward-mode formula.

First-order work never comes here and keeps the fused kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from metafocus.levels import forward_levels, transforming


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `softmax(q k' scale + mask) v` like `F.scaled_dot_product_attention`."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        query, key, value = query.to(low), key.to(low), value.to(low)
    with torch.autocast(device, enabled=False):
        return _attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    dtype = query.dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(repeats, dim=-3)
        value = value.repeat_interleave(repeats, dim=-3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.to(wide) * factor) @ key.to(wide).transpose(-1, -2)
    allowed = None
    if is_causal and attn_mask is not None:
        raise ValueError("attention takes is_causal=True or attn_mask, not both.")
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask
    elif attn_mask is not None:
        # -inf is taken out before the softmax: a row of nothing else would be NaN.
        allowed = ~torch.isneginf(attn_mask)
        scores = scores + attn_mask.masked_fill(~allowed, 0.0)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(wide).min)
    weights = scores.softmax(-1)
    if allowed is not None:
        # A query that may see no key gets zeros, as from the fused kernels.
        weights = weights.masked_fill(~allowed, 0.0)
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    return (weights @ value.to(wide)).to(dtype)


def multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    """Compute `F.multi_head_attention_forward`, which calls the fused attention inside."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.multi_head_attention_forward(*args, **kwargs)


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
    axes = [0, *range(2, input.ndim)]
    return _norm(
        input, axes, running_mean, running_var, weight, bias, training, momentum, eps, axes
    )


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Normalise over the spatial axes, like `F.instance_norm`."""
    axes = list(range(2, input.ndim))
    every = [0, *axes]
    return _norm(
        input, axes, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, every
    )


def _norm(
    x: Tensor,
    axes: list[int],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_batch: bool,
    momentum: float,
    eps: float,
    running_axes: list[int],
) -> Tensor:
    shape = [1, -1, *[1] * (x.ndim - 2)]
    if use_batch:
        mean = x.mean(axes, keepdim=True)
        var = ((x - mean) ** 2).mean(axes, keepdim=True)
        if running_mean is not None and running_var is not None:
            size = x.numel() // mean.numel()
            others = [a for a in running_axes if a not in axes]
            with torch.no_grad():
                for running, new in ((running_mean, mean), (running_var, var * size / (size - 1))):
                    new = new.detach().mean(others, keepdim=True) if others else new.detach()
                    running.mul_(1 - momentum).add_(momentum * new.reshape(-1))
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean.reshape(shape), running_var.reshape(shape)
    x = (x - mean) * torch.rsqrt(var + eps)
    if weight is not None:
        x = x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Normalise over groups of channels, like `F.group_norm`."""
    grouped = input.reshape(input.shape[0], num_groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    var = ((grouped - mean) ** 2).mean(-1, keepdim=True)
    x = ((grouped - mean) * torch.rsqrt(var + eps)).reshape(input.shape)
    shape = [1, -1, *[1] * (input.ndim - 2)]
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute `x sigmoid(x)`."""
    return input * torch.sigmoid(input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute `x tanh(softplus(x))`."""
    return input * torch.tanh(F.softplus(input))


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Compute the squared error, like `F.mse_loss`."""
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return _reduced((input - target) ** 2, reduction, weight)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute the Huber loss, like `F.huber_loss`."""
    # The square of the difference, not of its size: |x| has no second derivative at 0.
    difference = input - target
    size = difference.abs()
    inside = 0.5 * difference * difference
    error = torch.where(size <= delta, inside, delta * (size - 0.5 * delta))
    # Unlike mse_loss, the mean of the weighted errors is not divided by the weights.
    return _reduced(error if weight is None else error * weight, reduction, None)


def _reduced(error: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    if weight is not None:
        error = error * weight
        if reduction == "mean":
            return error.sum() / weight.expand_as(error).sum()
    return {"mean": error.mean, "sum": error.sum, "none": lambda: error}[reduction]()


_ALWAYS = {
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head_attention,
}
_IN_TRANSFORMS = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
}
_IN_FORWARD_MODE = {
    F.silu: silu,
    F.mish: mish,
    F.group_norm: group_norm,
    F.mse_loss: mse_loss,
    F.huber_loss: huber_loss,
}


class Swapped(TorchFunctionMode):
    """Inside this block, operators of the table are swapped where they need to be."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        composite = _ALWAYS.get(func)
        if composite is None and func in _IN_TRANSFORMS and transforming():
            composite = _IN_TRANSFORMS[func]
        if composite is None and func in _IN_FORWARD_MODE and forward_levels():
            composite = _IN_FORWARD_MODE[func]
        return (composite or func)(*args, **(kwargs or {}))


def active() -> bool:
    """Return whether operators are being swapped."""
    return any(isinstance(mode, Swapped) for mode in _get_current_function_mode_stack())


def differentiable_twice(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss evaluated with composites where a second derivative needs them.

    Example:
        >>> loss = differentiable_twice(lambda x: F.mse_loss(x, torch.zeros(1)))
        >>> torch.func.jvp(torch.func.grad(loss), (torch.ones(1),), (torch.ones(1),))[1]
        tensor([2.])
    """

    @functools.wraps(loss)
    def swapped(*args: Any) -> Tensor:
        with Swapped():
            return loss(*args)

    return swapped
