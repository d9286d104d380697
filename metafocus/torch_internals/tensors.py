"""Tensors and operators: nodes of the tape, the memory of a tensor, operators of ATen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

weight_norm: Any = torch._weight_norm  # pyright: ignore[reportPrivateImportUsage]
"""What `torch.nn.utils.weight_norm` calls: `v g / |v|`."""

_ATEN = torch.ops.aten
_FOREACH: Any = torch  # without stubs for what works on lists
flash_cpu: Any = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
flash_cpu_backward: Any = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default
cudnn: Any = _ATEN._scaled_dot_product_cudnn_attention.default
cudnn_backward: Any = _ATEN._scaled_dot_product_cudnn_attention_backward.default
flash_varlen: Any = _ATEN._flash_attention_forward
flash_varlen_backward: Any = _ATEN._flash_attention_backward


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of each tensor, in one vector, by few kernels; constants only."""
    return torch.stack(_FOREACH._foreach_norm(tensors))


def scaled(tensors: Sequence[Tensor], factors: Tensor) -> Sequence[Tensor]:
    """Return each tensor times its entry of `factors`; constants only."""
    return _FOREACH._foreach_mul(tensors, factors.unbind())


def moved_by(tensors: Sequence[Tensor], by: float, others: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return `tensor + by * other` of each pair, by few kernels; constants only."""
    return _FOREACH._foreach_add(tensors, others, alpha=by)


def forward_class(node: Any) -> type | None:
    """Return the custom Function that a node of the tape belongs to; None for a node of ATen."""
    return getattr(type(node), "_forward_cls", None)


def created_first(nodes: Iterable[Any]) -> list[Any]:
    """Return nodes of the tape in the order in which they were created."""
    return sorted(nodes, key=lambda node: node._sequence_nr())


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


def generator_key(generator: torch.Generator) -> int:
    """Return what identifies a generator: operators are given another object for it."""
    return generator._cdata  # pyright: ignore[reportAttributeAccessIssue]


def is_wrapper(x: Any) -> bool:
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
