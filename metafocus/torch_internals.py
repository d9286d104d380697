"""The one file that touches private parts of torch.

Each private name is used in one small function of a public meaning, and has a test in
`tests/test_torch_internals.py` that says what depends on it. Where a new release of torch moves a
name, that test fails, and this file is the only one to change.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.eager_transforms import _create_differentiable, grad_increment_nesting
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter,
    temporarily_pop_interpreter_stack,
)
from torch.nn import _reduction
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from metafocus.errors import TransformError

__all__ = ["TorchDispatchMode", "pytree"]

_PROXY = torch._C._TorchDispatchModeKey.PROXY  # pyright: ignore[reportAttributeAccessIssue]


# Which transforms and compilers are active.


def tracing() -> bool:
    """Return whether a compiler is looking at this code, so that no value can be looked at.

    Either `torch.compile`, or `make_fx` as `metafocus.graph` uses it.
    """
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_PROXY) is not None


def transforming() -> bool:
    """Return whether a transform or a compiler is looking at this code.

    A plain `forward_ad.dual_level` counts: gradients of the tape lose tangents there.
    """
    return tracing() or transform_active()


def transform_active() -> bool:
    """Return whether a transform is active, in a form that `torch.compile` can fold."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def forward_levels() -> int:
    """Return how many forward-mode transforms (jvp, jacfwd, linearize) are active."""
    if torch.compiler.is_compiling():
        return 0
    return sum(level.key() == _functorch.TransformType.Jvp for level in _transforms())


def _transforms() -> list[Any]:
    return _functorch.get_interpreter_stack() or []


def refuse_nested_forward_mode(name: str) -> None:
    """Raise if two forward-mode levels are active: through a custom Function they are wrong."""
    if forward_levels() > 1:
        raise TransformError(
            f"{name} inside two nested torch.func.jvp / jacfwd: torch returns a wrong second "
            "derivative there without an error. Use jacfwd(jacrev(f)) or jacrev(jacrev(f))."
        )


@contextlib.contextmanager
def outside_transforms() -> Iterator[None]:
    """Compute on the side, as if no transform were active, inside a `with` block."""
    with contextlib.ExitStack() as stack:
        for _ in _transforms():
            stack.enter_context(temporarily_pop_interpreter_stack())
        yield


class VmapLevel(NamedTuple):
    """A `vmap` over the plain tape, with functions that take tensors out of it and into it.

    Attributes:
        level: number of the transform.
        size: how many tasks are mapped.
    """

    level: int
    size: int

    def outside(self, x: Tensor) -> Tensor:
        """Return the plain tensor of all tasks, `[size, ...]`."""
        return _functorch._remove_batch_dim(x, self.level, self.size, 0)

    def inside(self, x: Tensor) -> Tensor:
        """Return a plain tensor `[size, ...]` as one task sees it."""
        return _functorch._add_batch_dim(x, 0, self.level)


def sole_vmap() -> VmapLevel | None:
    """Return the one `vmap` over the plain tape, if that is all that is active."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return None
    stack = _transforms()
    if len(stack) != 1 or stack[0].key() != _functorch.TransformType.Vmap:
        return None
    vmap: Any = retrieve_current_functorch_interpreter()
    return VmapLevel(vmap.level(), vmap.batch_size())


# Tensors under transforms, and the graph behind them.


def unwrap_dead(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors as they look from here: without wrappers of transforms that have ended.

    `torch.func.vjp` runs pullbacks after its level has ended. Operators take such a wrapper off
    by themselves; a custom Function at another live level fails on it.
    """
    return [_functorch.unwrap_if_dead(x) for x in tensors]


def is_tracked(x: Tensor) -> bool:
    """Return whether a tensor needs a derivative at any live level of differentiation."""
    if x.requires_grad:
        return True
    # The tangent of a batched tensor, if any, is that of what it wraps. Sparse tensors cannot be
    # asked for one.
    dual = forward_ad._current_level >= 0 and not _functorch.is_batchedtensor(x)
    if dual and forward_ad.unpack_dual(x, level=0).tangent is not None:
        return True
    if not _functorch.is_functorch_wrapped_tensor(x):
        return False
    with contextlib.ExitStack() as stack:
        # A tangent can only be looked at from its own level.
        for _ in _transforms()[_functorch.maybe_get_level(x) - 1 :]:
            stack.enter_context(temporarily_pop_interpreter_stack())
        return is_tracked(_functorch.get_unwrapped(x))


def innermost(x: Tensor) -> Tensor:
    """Return the tensor that transforms have wrapped, or the tensor itself."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def differentiated_again(tensors: Iterable[Tensor]) -> bool:
    """Return whether somebody may differentiate what a backward pass makes of these tensors.

    On the tape that is so with grad mode on. `torch.func.grad` always turns it on; there it takes
    a second transform that differentiates, or the tape below the first one.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return True
    kinds = [level.key() for level in _transforms()]
    others = [kind for kind in kinds if kind != _functorch.TransformType.Vmap]
    if others == [_functorch.TransformType.Grad]:
        return any(innermost(x).requires_grad for x in tensors)
    return bool(others) or torch.is_grad_enabled()


def is_batched(x: Tensor) -> bool:
    """Return whether a live `vmap` maps over a tensor: shapes may not depend on its values."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def plain(x: Tensor) -> Tensor:
    """Return a tensor as it is outside all transforms; of a batch that `vmap` maps, the first."""
    batched = []
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            batched.append(_functorch.maybe_get_bdim(x))
        x = _functorch.get_unwrapped(x)
    for axis in reversed(batched):
        x = x.select(axis, 0)
    return x


class OwnTape(NamedTuple):
    """A tape above the active transforms.

    Attributes:
        level: number of the level that it is recorded at.
    """

    level: int

    def leaf(self, x: Tensor) -> Tensor:
        """Return a leaf of this tape with the value of a constant."""
        return _create_differentiable(x.detach(), self.level)

    def holds(self, x: Tensor) -> bool:
        """Return whether a tensor depends on a leaf; one of another level depends on closures."""
        return _functorch.maybe_get_level(x) == self.level and x.requires_grad


@contextlib.contextmanager
def tape_of_its_own() -> Iterator[OwnTape]:
    """Record what is computed inside a `with` block, whatever transforms are active.

    `torch.autograd.grad` works on it, also after the block, and can be asked for some of the
    leaves. The pullback of `torch.func.vjp` always goes back to all of them.
    """
    with grad_increment_nesting() as level, torch.enable_grad():
        yield OwnTape(level)


def forward_class(node: Any) -> type | None:
    """Return the custom Function that a node of the tape belongs to; None for a node of ATen."""
    return getattr(type(node), "_forward_cls", None)


def keeps_graph() -> bool:
    """Return whether the backward pass that is running leaves its graph for another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore


def is_view(x: Tensor) -> bool:
    """Return whether autograd knows a tensor as a view of another one."""
    return x._is_view()


def version(x: Tensor) -> int | None:
    """Return a number that grows when a tensor is written to; None for inference tensors."""
    return None if x.is_inference() else x._version


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return what identifies the memory of a tensor, under however many names it is known."""
    return storage._cdata


def is_wrapper(x: Tensor) -> bool:
    """Return whether a tensor has no values of its own but holds other tensors, as DTensor does."""
    return hasattr(x, "__tensor_flatten__")


def parts_of(x: Tensor) -> list[Tensor]:
    """Return the dense tensors that hold the values of a tensor: itself, or those inside it."""
    if is_wrapper(x):
        names, _ = x.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        # A DTensor names its mesh too.
        held = [getattr(x, name) for name in names]
        return [part for y in held if isinstance(y, Tensor) for part in parts_of(y)]
    if x.layout == torch.strided:
        return [x]
    if x.layout == torch.sparse_coo:
        return [x._values()]
    # Compressed rows or columns; what only MKL-DNN knows has no memory that can be looked at.
    return [x.values()] if str(x.layout).startswith("torch.sparse") else []


# Modules: their own tables, and the hooks in them.


def swapped_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], *, tie_weights: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Let a module hold other tensors as parameters and buffers inside a `with` block.

    An interrupt inside torch's exit leaves them there; `calls.holding` puts that right.
    """
    return _reparametrize_module(module, dict(tensors), tie_weights=tie_weights)


def parameter_table(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's own table of its parameters: a write changes the module."""
    return module._parameters  # pyright: ignore[reportReturnType]


def weight_tables(module: nn.Module) -> tuple[dict[str, Tensor | None], ...]:
    """Return the module's own tables of parameters and of buffers; one without any is left out."""
    tables: Any = module._parameters, module._buffers
    return tuple(table for table in tables if table)


def forward_hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return the hooks that run before and after a module, in this order."""
    return (*module._forward_pre_hooks.values(), *module._forward_hooks.values())


def has_backward_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks on its gradients."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` has replaced the call of a module."""
    return module._compiled_call_impl is not None


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile(module)` has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def raised_by_functional_call(error: BaseException) -> bool:
    """Return whether `torch.func.functional_call` raised an error because of a name."""
    accessor = "torch.nn.utils._named_member_accessor"
    return any(
        frame.f_globals.get("__name__") == accessor
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


# Modes: what torch functions and operators pass through.


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


# Operators that torch keeps to itself.

weight_norm = torch._weight_norm  # pyright: ignore[reportPrivateImportUsage]
"""What `torch.nn.utils.weight_norm` calls: `v g / |v|`."""

_ATEN = torch.ops.aten
flash_cpu = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
flash_cpu_backward = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default
flash_varlen = _ATEN._flash_attention_forward
flash_varlen_backward = _ATEN._flash_attention_backward


def assert_later(condition: Tensor, message: str) -> None:
    """Stop the program if a tensor is False, without waiting for its device."""
    torch._assert_async(condition, message)  # pyright: ignore[reportPrivateImportUsage]


def reduction_of(size_average: bool | None, reduce: bool | None) -> str:
    """Return "mean", "sum" or "none" for the arguments that `reduction` has replaced in torch."""
    return _reduction.legacy_get_string(size_average, reduce)


def operator_arguments(operator: Any) -> Sequence[Any]:
    """Return the arguments of an operator: each has a name, and says whether it is written to."""
    return operator._schema.arguments


def constant_when_compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function whose result `torch.compile` may take as a constant.

    The public decorator imports the compiler at once, which takes seconds.
    """
    fn._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return fn
