"""The one file that touches private parts of torch.

Each private name is used in one small function of a public meaning, and has a test in
`tests/test_torch_internals.py` that says what depends on it. Where a new release of torch moves a
name, that test fails, and this file is the only one to change.
"""

from __future__ import annotations

import contextlib
import re
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
    """A `vmap` over the plain tape, and the way of tensors out of it and into it.

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


def is_batched(x: Tensor) -> bool:
    """Return whether a live `vmap` maps over a tensor: shapes may not depend on its values."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def foreign_leaves(result: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves that a tensor of the tape depends on and that are not among `own`."""
    mine = {id(x) for x in own}
    if result.grad_fn is None:
        return [] if not result.requires_grad or id(result) in mine else [result]
    # Only the node of a leaf has a variable.
    found = [getattr(node, "variable", None) for node in _nodes([result])]
    return [leaf for leaf in found if leaf is not None and id(leaf) not in mine]


def foreign_nodes(results: Iterable[Tensor]) -> list[str]:
    """Return the names of custom kernels that tensors of the tape depend on.

    Nodes of ATen's own, of torch.distributed and of this package have all derivatives.
    """
    return sorted({n.name() for n in _nodes(results) if not _has_all_derivatives(n)})


_ATEN_NODE = re.compile(r"(Backward\d+|AccumulateGrad|CopyBackwards|CopySlices|Barrier|Error)$")


def _has_all_derivatives(node: Any) -> bool:
    custom = getattr(type(node), "_forward_cls", None)
    if custom is not None:
        return custom.__module__.startswith(("metafocus.", "torch.distributed."))
    return bool(_ATEN_NODE.search(node.name()))


def _nodes(results: Iterable[Tensor]) -> Iterator[Any]:
    seen, pending = set(), [x.grad_fn for x in results if x.grad_fn is not None]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        pending += [parent for parent, _ in node.next_functions if parent is not None]


class Writes(TorchDispatchMode):
    """Records what is written to inside a block and was not made there.

    Attributes:
        saved: each tensor that was written to, and a copy of what it held before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[tuple[Tensor, Tensor]] = []
        self._made: set[int] = set()
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in _bound(func, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in pytree.tree_leaves(value):
                    self._note(x)
        out = func(*args, **kwargs)
        self._made |= _storages(out) - _storages((args, kwargs))
        return out

    def _note(self, x: Any) -> None:
        if _has_storage(x):
            key = storage_key(x.untyped_storage())
            if key not in self._made and key not in self._seen:
                self._seen.add(key)
                self.saved.append((x, x.clone()))


def _storages(tree: Any) -> set[int]:
    found = (x for x in pytree.tree_leaves(tree) if _has_storage(x))
    return {storage_key(x.untyped_storage()) for x in found}


def _has_storage(x: Any) -> bool:
    # Wrappers such as DTensor have none of their own.
    return type(x) in (Tensor, torch.nn.Parameter)


def _bound(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            yield argument, args[i]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


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


def unused_by(loss: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that a scalar does not depend on; inside transforms too."""
    if not transforming():
        # The tape accepts what a transform refuses: batch norm that counts its batches, a loss
        # that builds a graph of its own, custom Functions of the old form.
        return _unused({k: v.detach().requires_grad_() for k, v in at.items()}, loss, -1)
    with grad_increment_nesting() as level:
        leaves = {k: _create_differentiable(v.detach(), level) for k, v in at.items()}
        return _unused(leaves, loss, level)


def _unused(
    leaves: dict[str, Tensor], loss: Callable[[dict[str, Tensor]], Tensor], level: int
) -> set[str]:
    value = loss(dict(leaves))
    # A value of another level depends on what is closed over, and not on these leaves.
    if _functorch.maybe_get_level(value) != level or not value.requires_grad:
        return set(leaves)
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {k for k, g in zip(leaves, found, strict=True) if g is None}


def is_view(x: Tensor) -> bool:
    """Return whether autograd knows a tensor as a view of another one."""
    return x._is_view()


def version(x: Tensor) -> int | None:
    """Return a number that grows when a tensor is written to; None for inference tensors."""
    return None if x.is_inference() else x._version


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return what identifies the memory of a tensor, under however many names it is known."""
    return storage._cdata


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
    return tuple(table for table in (module._parameters, module._buffers) if table)


def forward_hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return the hooks that run before and after a module, in this order."""
    return (*module._forward_pre_hooks.values(), *module._forward_hooks.values())


def has_backward_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks on its gradients."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` has replaced the call of a module."""
    return module._compiled_call_impl is not None


def raised_by_functional_call(error: BaseException) -> bool:
    """Return whether `torch.func.functional_call` raised an error because of a name."""
    accessor = "torch.nn.utils._named_member_accessor"
    return any(
        frame.f_globals.get("__name__") == accessor
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


# Modes: what torch functions and operators pass through.


@contextlib.contextmanager
def new_tensors() -> Iterator[list[Tensor]]:
    """Collect the tensors that torch functions return inside a `with` block."""
    with _Recorded() as recorded:
        yield recorded.made


class _Recorded(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        return out


def function_modes() -> list[TorchFunctionMode]:
    """Return the modes that torch functions pass through, the innermost last."""
    return _get_current_function_mode_stack()


_STACKS = (function_modes, _get_current_dispatch_mode_stack)


def modes() -> Callable[[], None]:
    """Return a function that puts the modes of this thread back: gradients, autocast, modes above.

    An interrupt at the end of a `with` block leaves the mode that the block has set.
    """
    kinds = [kind for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind)]

    def state() -> tuple[Any, ...]:
        torch.autocast_increment_nesting()
        return (
            torch.is_grad_enabled(),
            torch.autocast_decrement_nesting(),
            torch.is_autocast_cache_enabled(),
            *((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds),
        )

    before, depths = state(), [len(stack()) for stack in _STACKS]

    def put_back() -> None:
        for stack, depth in zip(_STACKS, depths, strict=True):
            while len(stack()) > depth:
                stack()[-1].__exit__(None, None, None)
        if state() == before:
            return
        grad, nesting, cache, *casts = before
        torch.set_grad_enabled(grad)
        torch.autocast_increment_nesting()
        while torch.autocast_decrement_nesting() > nesting:
            pass
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(cache)
        for kind, (enabled, dtype) in zip(kinds, casts, strict=True):
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)

    return put_back


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


def argument_names(operator: Any) -> list[str]:
    """Return the names of the arguments of an operator of a traced graph."""
    return [argument.name for argument in operator._schema.arguments]
