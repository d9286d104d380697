"""Modes: what torch functions and operators pass through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from metafocus.torch_internals.transforms import forward_levels

_GRAD: Any = torch._C
set_grad_mode: Any = _GRAD._set_grad_enabled
"""What `torch.no_grad` and `torch.enable_grad` call."""


class GradModes:
    """Sets grad mode, and inside forward mode its own switch too, which torch leaves on.

    Blocks such as `torch.no_grad()` are left in the reverse order: a call that puts back what the
    last one changed leaves its block.
    """

    def __init__(self) -> None:
        self.entered: list[tuple[bool, bool, bool]] = []

    def set(self, enabled: bool) -> None:
        """Enter a block with or without derivatives, or leave one."""
        before, forward = torch.is_grad_enabled(), _GRAD._is_fwd_grad_enabled()
        set_grad_mode(enabled)
        if not forward_levels() or (enabled and before):
            return
        if self.entered and self.entered[-1][:2] == (enabled, before):
            forward = self.entered.pop()[2]
        else:
            # Torch itself switches it off while a custom Function runs.
            switched_off_here = bool(self.entered)
            self.entered.append((before, enabled, forward))
            forward = enabled and (forward or switched_off_here)
        _GRAD._set_fwd_grad_enabled(forward)


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


def without_values(
    tensors: Sequence[Tensor], dims: Sequence[Sequence[bool]] | None = None
) -> tuple[Sequence[Tensor], Callable[[], Callable[[Sequence[Tensor]], bool]]]:
    """Return tensors without values, for tracing.

    Args:
        tensors: what they are made of.
        dims: which sizes are unknown while tracing; None: none of them.

    Returns:
        The tensors, and a function to be called after tracing, which returns
        `fits(other tensors)`: whether what was traced is right for them as well.
    """
    # Imported at the call: they load much of the compiler.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental import symbolic_shapes as symbolic

    if dims is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        return [mode.from_tensor(x, static_shapes=True) for x in tensors], lambda: lambda _: False
    # What depends on a value raises, as it does above.
    env = symbolic.ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    kinds = (symbolic.DimDynamic.STATIC, symbolic.DimDynamic.DYNAMIC)
    unknown = [
        mode.from_tensor(
            x,
            symbolic_context=symbolic.StatelessSymbolicContext(
                dynamic_sizes=[kinds[d] for d in of_x]
            ),
        )
        for x, of_x in zip(tensors, dims, strict=True)
    ]

    def guards() -> Callable[[Sequence[Tensor]], bool]:
        code = env.produce_guards_expression(unknown, ignore_static=False)
        return lambda others: code is None or env.evaluate_guards_expression(code, others)

    return unknown, guards


def compiled_for_unknown(tensors: Sequence[Tensor], dims: Sequence[Sequence[bool]]) -> None:
    """Let `torch.compile`, called with these tensors first, take some of their sizes as unknown.

    With `dynamic=True` it would also take sizes that happen to be equal for the same one.
    """
    for x, unknown in zip(tensors, dims, strict=True):
        torch._dynamo.maybe_mark_dynamic(x, [i for i, u in enumerate(unknown) if u])
