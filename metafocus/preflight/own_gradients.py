"""What a loss does with gradients itself: takes some, as a gradient penalty does, or changes them.

The graph of a loss that takes gradients holds what the backward passes of its kernels compute, not
the kernels. A backward pass without a graph loses a term of the loss's first derivative, without an
error. A hook that changes a gradient holds on the tape only: transforms run no hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metafocus import params as pt
from metafocus.autodiff.tape import foreign_nodes
from metafocus.errors import TransformError
from metafocus.torch_internals import forward_levels, transforming

_BACKWARD = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
_DETACHING = (Tensor.detach, torch.detach)


class OwnGradients(TorchFunctionMode):
    """Watches a loss in a `with` block.

    Attributes:
        kernels: the names of the custom kernels that it differentiates itself.
        detaches: whether it detaches anything; then it may cut off the data on purpose.
        hooked: whether a hook of its own has changed a gradient, in a backward pass since then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()
        self.detaches: bool = False
        self.hooked: bool = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.detaches = self.detaches or func in _DETACHING
        if func in _BACKWARD and (kwargs or {}).get("create_graph"):
            self.kernels.update(foreign_nodes(pt.tensors(args[0])))
        if func is Tensor.register_hook:
            return func(args[0], self._watched(args[1]))
        return func(*args, **(kwargs or {}))

    def _watched(
        self, hook: Callable[[Tensor], Tensor | None]
    ) -> Callable[[Tensor], Tensor | None]:
        @functools.wraps(hook)
        def watched(gradient: Tensor) -> Tensor | None:
            changed = hook(gradient)
            # Sharded models have hooks that return what they are given.
            self.hooked |= changed is not None and changed is not gradient
            return changed

        return watched


def on_tape_only(who: str, loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss whose hooks change gradients: it raises where torch would not run them."""

    @functools.wraps(loss)
    def guarded(*args: Any) -> Any:
        if transforming() or forward_levels():
            raise hooked(who, "which torch does not run inside transforms and in forward mode")
        return loss(*args)

    return guarded


def hooked(who: str, why: str) -> TransformError:
    """Return the error for hooks that an estimator would not follow."""
    return TransformError(
        f"{who} changes a gradient by register_hook, {why}: the hypergradient would be another "
        "one. Use Unrolled() or FirstOrder(), without recompute, vmap and torch.func (over tasks "
        'how="loop"), or write a torch.autograd.Function with setup_context and '
        "generate_vmap_rule = True."
    )
