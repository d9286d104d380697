"""The one file that touches private parts of torch."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.eager_transforms import _create_differentiable, grad_increment_nesting
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from metafocus.errors import TransformError

_PROXY = torch._C._TorchDispatchModeKey.PROXY  # pyright: ignore[reportAttributeAccessIssue]


def tracing() -> bool:
    """Return whether a compiler is looking at this code, so that no value can be looked at.

    Either `torch.compile`, or `make_fx` as `metafocus.graph` uses it.
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
        for _ in _functorch.get_interpreter_stack()[_functorch.maybe_get_level(x) - 1 :]:
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


def foreign_leaves(result: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves that a tensor of the tape depends on and that are not among `own`."""
    mine = {id(x) for x in own}
    if result.grad_fn is None:
        return [] if not result.requires_grad or id(result) in mine else [result]
    found, seen, pending = [], set(), [result.grad_fn]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        # Only the node of a leaf has a variable.
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in mine:
            found.append(leaf)
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    return found


def unused_by(loss: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that a scalar does not depend on; inside transforms too."""
    if not transforming():
        # The tape accepts what a transform refuses: batch norm that counts its batches, a loss
        # that builds a graph of its own, custom Functions of the old form.
        return _unused({k: v.detach().requires_grad_() for k, v in at.items()}, loss)
    with grad_increment_nesting() as level:
        return _unused({k: _create_differentiable(v.detach(), level) for k, v in at.items()}, loss)


def _unused(leaves: dict[str, Tensor], loss: Callable[[dict[str, Tensor]], Tensor]) -> set[str]:
    value = loss(dict(leaves))
    if not is_tracked(value):
        return set(leaves)
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {k for k, g in zip(leaves, found, strict=True) if g is None}


def raised_by_functional_call(error: BaseException) -> bool:
    """Return whether `torch.func.functional_call` raised an error because of a name."""
    accessor = "torch.nn.utils._named_member_accessor"
    return any(
        frame.f_globals.get("__name__") == accessor
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


@contextlib.contextmanager
def outside_transforms() -> Iterator[None]:
    """Compute on the side, as if no transform were active, inside a `with` block."""
    with contextlib.ExitStack() as stack:
        for _ in _functorch.get_interpreter_stack() or []:
            stack.enter_context(temporarily_pop_interpreter_stack())
        yield
