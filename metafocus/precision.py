"""Types of numbers: one rule for half precision, and autocast for what is computed by hand."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums of numbers of this type are taken: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """Return half-precision tensors in float32, others as they are.

    The one rule of the package: half types hold inputs and results, never what is added up.
    """
    return x.to(wide_type(x.dtype)) if x.is_floating_point() else x


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the type of autocast, where it is on, as matrix products take them.

    Float64 stays, and so do all tensors where autocast is off.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    low = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(low) for x in tensors)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Compute in the given types inside a `with` block, whether autocast is on or not.

    Autocast would take a matrix product of float32 in a half type.
    """
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


def tf32_products() -> bool:
    """Return whether float32 products on CUDA may round their factors to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


_scopes = threading.Lock()
_open = 0
_before = "none"


@contextlib.contextmanager
def half_in_tf32(dtype: torch.dtype) -> Iterator[None]:
    """Take float32 products on CUDA in TF32 inside a `with` block, if `dtype` is a half type.

    Numbers of float16 and bfloat16 are numbers of TF32 too, so a product of two of them is exact,
    and it is summed in float32; other factors are rounded to 11 digits. For other types nothing
    changes, and on a CPU nothing ever does. The setting is one for all threads of a process: the
    last block that ends puts back what the first one found.
    """
    global _open, _before
    if dtype not in (torch.float16, torch.bfloat16):
        yield
        return
    settings = torch.backends.cuda.matmul
    with _scopes:
        if not _open:
            _before = settings.fp32_precision
            settings.fp32_precision = "tf32"
        _open += 1
    try:
        yield
    finally:
        with _scopes:
            _open -= 1
            if not _open:
                settings.fp32_precision = _before
