"""Which function transforms are active: the one place that looks into functorch's interior."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from metafocus.errors import TransformError


def transforming() -> bool:
    """Return whether a functorch transform or a compiler is looking at this code."""
    return torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None


def forward_levels() -> int:
    """Return how many forward-mode transforms (jvp, jacfwd, linearize) are active."""
    if torch.compiler.is_compiling():
        return 0
    stack = _functorch.get_interpreter_stack() or []
    return sum(level.key() == _functorch.TransformType.Jvp for level in stack)


def refuse_nested_forward_mode(name: str) -> None:
    """Raise if two forward-mode levels are active: through a custom Function they are wrong."""
    if forward_levels() > 1:
        raise TransformError(
            f"{name} inside two nested torch.func.jvp / jacfwd: torch returns a wrong second "
            "derivative there without an error. Use jacfwd(jacrev(f)) or jacrev(jacrev(f))."
        )


def is_tracked(x: Tensor) -> bool:
    """Return whether a tensor needs a derivative at any live level of differentiation."""
    while not x.requires_grad and not _has_tangent(x):
        if not _functorch.is_functorch_wrapped_tensor(x):
            return False
        x = _functorch.get_unwrapped(x)
    return True


def _has_tangent(x: Tensor) -> bool:
    if _functorch.is_batchedtensor(x):
        return False  # its tangent, if any, is that of what it wraps
    return forward_ad.unpack_dual(x, level=0).tangent is not None
