"""Which function transforms are active: the one place that looks into functorch's interior."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from metafocus.errors import TransformError

_PROXY = torch._C._TorchDispatchModeKey.PROXY  # pyright: ignore[reportAttributeAccessIssue]


def tracing() -> bool:
    """Return whether a compiler is looking at this code, so that no value can be looked at.

    Either `torch.compile`, or `make_fx` as `metafocus.compiled` uses it.
    """
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_PROXY) is not None


def transforming() -> bool:
    """Return whether a transform or a compiler is looking at this code.

    A plain `forward_ad.dual_level` counts: gradients of the tape lose tangents there.
    """
    return (
        tracing()
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


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


def alive(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors as they look from here: without wrappers of transforms that have ended.

    `torch.func.vjp` runs pullbacks after its level has ended. Operators take such a wrapper off
    by themselves; a custom Function at another live level fails on it.
    """
    return [_functorch.unwrap_if_dead(x) for x in tensors]


def is_tracked(x: Tensor) -> bool:
    """Return whether a tensor needs a derivative at any live level of differentiation."""
    if x.requires_grad:
        return True
    # The tangent of a batched tensor, if any, is that of what it wraps.
    batched = _functorch.is_batchedtensor(x)
    if not batched and forward_ad.unpack_dual(x, level=0).tangent is not None:
        return True
    if not _functorch.is_functorch_wrapped_tensor(x):
        return False
    with contextlib.ExitStack() as stack:
        # A tangent can only be looked at from its own level.
        for _ in _functorch.get_interpreter_stack()[_functorch.maybe_get_level(x) - 1 :]:
            stack.enter_context(temporarily_pop_interpreter_stack())
        return is_tracked(_functorch.get_unwrapped(x))


def is_batched(x: Tensor) -> bool:
    """Return whether a live `vmap` maps over a tensor: shapes may not depend on its values."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


@contextlib.contextmanager
def outside_transforms() -> Iterator[None]:
    """Compute on the side, as if no transform were active, inside a `with` block."""
    with contextlib.ExitStack() as stack:
        for _ in _functorch.get_interpreter_stack() or []:
            stack.enter_context(temporarily_pop_interpreter_stack())
        yield
