"""Losses with a second derivative and a forward mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metafocus.torch_internals import reduction_of


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
        reduction = reduction_of(size_average, reduce)
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
        reduction = reduction_of(size_average, reduce)
    return _reduced(-F.logsigmoid(target * input), reduction, None)


def _reduced(error: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    if weight is not None:
        error = error * weight
        if reduction == "mean":
            return error.sum() / weight.expand_as(error).sum()
    return {"mean": error.mean, "sum": error.sum, "none": lambda: error}[reduction]()
