"""The type in which autocast runs an operator, for the composite that replaces it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metafocus.precision import no_autocast, wide
from metafocus.torch_internals import pytree


def in_float32(composite: Callable[..., Tensor], devices: tuple[str, ...] = ()) -> Any:
    """Return the composite of an operator that autocast takes to float32.

    Args:
        composite: a function of tensors and other arguments.
        devices: types of device on which autocast does so; default: all.
    """

    @functools.wraps(composite)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        device = first.device.type
        if (devices and device not in devices) or not torch.is_autocast_enabled(device):
            return composite(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, wide, (args, kwargs))
        # Its products would be taken back to half types.
        with no_autocast(first.device):
            return composite(*args, **kwargs)

    return run
