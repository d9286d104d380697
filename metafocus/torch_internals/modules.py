"""Modules: their own tables, the hooks in them, and what compilers have made of them."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module


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


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds besides parameters, buffers and children: hooks, too."""
    tables = ("_parameters", "_buffers", "_modules")
    return {k: v for k, v in vars(module).items() if k not in tables}


def has_backward_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks on its gradients."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def child_table(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the module's own table of its children: a write changes the module."""
    return module._modules


def keeps_gathered(model: nn.Module) -> bool:
    """Return whether FSDP2 leaves every weight of a model whole after forward and backward passes.

    Only then may a backward pass be differentiated: it reads the weights once more.
    """
    states: Any = [m._get_fsdp_state() for m in model.modules() if hasattr(m, "_get_fsdp_state")]  # pyright: ignore[reportCallIssue]
    groups = [group for state in states for group in state._fsdp_param_groups]
    return not any(group.post_forward_mesh_info or group.reshard_after_backward for group in groups)


def runs_beside_ddp(parameters: Sequence[nn.Parameter]) -> bool:
    """Return whether a DDP wrapper would reduce these parameters, and its forward is not running.

    Nothing in a module leads to its wrapper, so the garbage collector is asked: call it once.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    kind: Any = nn.parallel.DistributedDataParallel
    wanted = {id(parameter) for parameter in parameters}
    for wrapper in gc.get_objects():
        if type(wrapper) is kind and wrapper.require_backward_grad_sync:
            own = {id(parameter) for parameter in wrapper._module_parameters}
            if own & wanted:
                return kind._active_ddp_module is not wrapper
    return False


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` has replaced the call of a module."""
    return module._compiled_call_impl is not None


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile(module)` has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def uncompiled_function(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that `torch.compile(fn)` has wrapped, or the function itself."""
    return getattr(fn, "_torchdynamo_orig_callable", fn)


def raised_by_functional_call(error: BaseException) -> bool:
    """Return whether `torch.func.functional_call` raised an error because of a name."""
    accessor = "torch.nn.utils._named_member_accessor"
    return any(
        frame.f_globals.get("__name__") == accessor
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
