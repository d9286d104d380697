"""Activations, entry by entry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute `x sigmoid(x)`."""
    return input * torch.sigmoid(input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute `x tanh(softplus(x))`."""
    return input * torch.tanh(F.softplus(input))


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute `relu6(x + 3) / 6`."""
    return F.relu6(input + 3) / 6
