"""Roots and quotients whose derivatives are finite where the plain ones are not."""

from __future__ import annotations

import torch
from torch import Tensor


def safe_sqrt(x: Tensor) -> Tensor:
    """Return the square root with the derivative 0 at 0; NaN stays NaN."""
    positive = ~(x <= 0)
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def safe_divide(x: Tensor, by: Tensor) -> Tensor:
    """Return `x / by`, and 0 where `by` is 0, with derivatives that are finite there."""
    nonzero = by != 0
    return torch.where(nonzero, x / torch.where(nonzero, by, 1.0), 0.0)
