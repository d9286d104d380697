"""Normalisation, with statistics that are differentiated like everything else.

Running statistics are read in eval mode, and never written to: an evaluation of a loss inside an
estimator must not change the module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metafocus.errors import ProblemError
from metafocus.precision import wide


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
    axes = [0, *range(2, input.ndim)]
    return _norm(input, axes, running_mean, running_var, weight, bias, training, eps)


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
    """Normalise over the spatial axes, like `F.instance_norm`; running statistics stay."""
    axes = list(range(2, input.ndim))
    return _norm(input, axes, running_mean, running_var, weight, bias, use_input_stats, eps)


def _norm(
    x: Tensor,
    axes: list[int],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_batch: bool,
    eps: float,
) -> Tensor:
    shape = [1, -1, *[1] * (x.ndim - 2)]
    check_channels(x, running_mean, running_var, weight, bias, use_batch, axes)
    dtype, x = x.dtype, wide(x)
    if use_batch:
        mean = x.mean(axes, keepdim=True)
        var = ((x - mean) ** 2).mean(axes, keepdim=True)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = (wide(t).reshape(shape) for t in (running_mean, running_var))
    x = (x - mean) * torch.rsqrt(var + eps)
    x = x if weight is None else x * weight.reshape(shape)
    return (x if bias is None else x + bias.reshape(shape)).to(dtype)


def check_channels(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_batch: bool,
    axes: Sequence[int],
) -> None:
    """Raise where torch raises: its checks are inside the operators that are replaced."""
    if use_batch and math.prod(x.shape[a] for a in axes) == 1:
        raise ProblemError(
            f"A norm in training mode needs more than 1 value per channel, got an input of shape "
            f"{list(x.shape)}, whose variance is 0. Use a larger batch, or eval()."
        )
    vectors = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    for name, value in vectors.items():
        if value is not None and value.numel() != x.shape[1]:
            raise ProblemError(
                f"{name} of a norm must have one element per channel, {x.shape[1]}, got shape "
                f"{list(value.shape)}."
            )
    if (running_mean is None) != (running_var is None):
        raise ProblemError("running_mean and running_var must be given both or not at all.")
    if running_mean is None and not use_batch:
        raise ProblemError(
            "A norm without running_mean and running_var has no statistics in eval mode. Use "
            "those of the input: training=True."
        )


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
    x = wide(input)
    x = x - x.mean(axes, keepdim=True)
    x = x * torch.rsqrt((x * x).mean(axes, keepdim=True) + eps)
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).to(dtype)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Normalise over groups of channels, like `F.group_norm`."""
    grouped = wide(input).reshape(input.shape[0], num_groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    var = ((grouped - mean) ** 2).mean(-1, keepdim=True)
    x = ((grouped - mean) * torch.rsqrt(var + eps)).reshape(input.shape)
    shape = [1, -1, *[1] * (input.ndim - 2)]
    x = x if weight is None else x * weight.reshape(shape)
    return (x if bias is None else x + bias.reshape(shape)).to(input.dtype)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute `v g / |v|` for `torch.nn.utils.weight_norm`, the norm over all axes but `dim`."""
    axes = None if dim == -1 else [a for a in range(v.ndim) if a != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=dim != -1))
