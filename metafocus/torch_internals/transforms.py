"""Transforms and compilers: which are active, and tensors as they look from outside of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.eager_transforms import _create_differentiable, grad_increment_nesting
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter,
    temporarily_pop_interpreter_stack,
)

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

    On the tape this is the case with grad mode on. `torch.func.grad` always turns it on; there it
    takes a second transform that differentiates, or the tape below the first one.
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
