"""Modes: what torch functions and operators pass through."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def function_modes() -> list[TorchFunctionMode]:
    """Return the modes that torch functions pass through, the innermost last."""
    return _get_current_function_mode_stack()


def mode_state() -> tuple[int, int, Any]:
    """Return how many modes this thread passes through, of both kinds, and if it listens to them.

    A compiler and `torch.func` keep theirs elsewhere.
    """
    internals: Any = torch._C
    return (
        internals._len_torch_function_stack(),
        internals._len_torch_dispatch_stack(),
        internals._get_torch_function_state(),
    )


def leave_modes(state: tuple[int, int, Any]) -> None:
    """Leave the modes that were entered since `mode_state`, and listen again if it did."""
    functions, dispatches, overrides = state
    for stack, depth in (
        (_get_current_function_mode_stack, functions),
        (_get_current_dispatch_mode_stack, dispatches),
    ):
        for mode in reversed(stack()[depth:]):
            mode.__exit__(None, None, None)
    torch._C._set_torch_function_state(overrides)  # pyright: ignore[reportAttributeAccessIssue]


def without_function_modes() -> contextlib.AbstractContextManager[None]:
    """Compute without any of these modes and overrides inside a `with` block."""
    return torch._C.DisableTorchFunction()  # pyright: ignore[reportReturnType]


def fake_tensors() -> Any:
    """Return a mode whose `from_tensor` makes tensors without values, for tracing.

    Imported at the call: it loads much of the compiler.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)
