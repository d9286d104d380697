"""Operators on rows: looked up in a table, or their distances from each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Look rows up like `F.embedding`; the row of the padding index gets no gradient."""
    rows = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return rows
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, rows.detach(), rows)


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
