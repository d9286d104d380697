"""Operators of torch written out in pieces that have derivatives of every order.

Each takes the arguments of its namesake in `torch.nn.functional` and equals it; `composites` says
when one stands in for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.nn.attention import SDPBackend, sdpa_kernel


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


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Normalise over the last axes, like `F.layer_norm`."""
    axes = list(range(-len(normalized_shape), 0))
    dtype = input.dtype
    x = input.to(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)
    x = x - x.mean(axes, keepdim=True)
    x = x * torch.rsqrt((x * x).mean(axes, keepdim=True) + eps)
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).to(dtype)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute `v g / |v|` like `torch._weight_norm`, the norm over all axes but `dim`."""
    axes = None if dim == -1 else [a for a in range(v.ndim) if a != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=dim != -1))


def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Look rows up like `F.embedding`; the row of the padding index gets no gradient."""
    rows = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return rows
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, rows.detach(), rows)


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


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute `relu6(x + 3) / 6`."""
    return F.relu6(input + 3) / 6


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


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute `log(1 + exp(-target * input))`, like `F.soft_margin_loss`."""
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return _reduced(-F.logsigmoid(target * input), reduction, None)


def _reduced(error: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    if weight is not None:
        error = error * weight
        if reduction == "mean":
            return error.sum() / weight.expand_as(error).sum()
    return {"mean": error.mean, "sum": error.sum, "none": lambda: error}[reduction]()


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Compute the distance of each row of `x1` to each row of `x2`, like `torch.cdist`."""
    return _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """Compute the distance of each row to each later row, like `F.pdist`."""
    rows, columns = torch.triu_indices(
        len(input), len(input), offset=1, device=input.device
    ).unbind()
    return _length(input[rows] - input[columns], p)


def _length(x: Tensor, p: float) -> Tensor:
    if p == 0:
        return (x != 0).to(x.dtype).sum(-1)
    size = x.abs()
    if p == 1:
        return size.sum(-1)
    if p == float("inf"):
        return size.amax(-1)
    # A distance of zero has derivative zero, as in torch, and so of every order.
    return _power(_power(size, p).sum(-1), 1 / p)


def _power(x: Tensor, exponent: float) -> Tensor:
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0) ** exponent, 0.0)
