"""The type in which autocast runs an operator, for the composite that stands in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def float32(composite: Callable[..., Tensor], devices: tuple[str, ...] = ()) -> Any:
    """Return the composite of an operator that autocast takes to float32.

    Args:
        composite: of tensors, the first argument among them.
        devices: types of device on which autocast does so; default: all.
    """

    @functools.wraps(composite)
    def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = input.device.type
        if (devices and device not in devices) or not torch.is_autocast_enabled(device):
            return composite(input, *args, **kwargs)
        (input, *args), kwargs = pytree.tree_map_only(Tensor, _wide, ((input, *args), kwargs))
        # Its products would be taken back to half types.
        with torch.autocast(device, enabled=False):
            return composite(input, *args, **kwargs)

    return run


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
