"""Arithmetic on `dict[str, Tensor]`, and pytrees of data taken apart into tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metafocus.torch_internals import pytree, transforming
from metafocus.types import Params


def add(a: Params, b: Params, scale: float | Tensor = 1.0) -> Params:
    """Return `a + scale * b`."""
    return {k: a[k] + scale * b[k] for k in a}


def sub(a: Params, b: Params) -> Params:
    """Return `a - b`."""
    return {k: a[k] - b[k] for k in a}


def scale(a: Params, factor: float | Tensor) -> Params:
    """Return `factor * a`."""
    return {k: factor * v for k, v in a.items()}


def zeros_like(a: Params) -> Params:
    """Return zeros of the shapes of `a`."""
    return {k: torch.zeros_like(v) for k, v in a.items()}


def dot(a: Params, b: Params) -> Tensor:
    """Return the inner product `sum_k <a_k, b_k>`, a scalar."""
    terms = [(a[k] * b[k]).sum() for k in a]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def norm(a: Params) -> Tensor:
    """Return the Euclidean norm over all entries, a scalar."""
    return dot(a, a).sqrt()


def constant(a: Params) -> bool:
    """Return whether there are entries, all of them plain tensors without any derivative.

    Such ones can go through kernels that take many tensors at once, and that neither transforms
    nor compilers know.
    """
    plain = all(type(v) is Tensor and not v.requires_grad for v in a.values())
    return bool(a) and plain and not transforming()


def shapes(a: Params) -> dict[str, list[int]]:
    """Return the shape of each entry, as messages show it."""
    return {k: list(v.shape) for k, v in a.items()}


def detach(tree: Any) -> Any:
    """Return the pytree with every tensor detached from every level of differentiation."""
    if isinstance(tree, Tensor):
        return tree.detach()
    # Most of what comes here, many times faster than the general way.
    if type(tree) is dict:
        return {k: v.detach() if isinstance(v, Tensor) else detach(v) for k, v in tree.items()}
    if type(tree) is tuple:
        return tuple([v.detach() if isinstance(v, Tensor) else detach(v) for v in tree])
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def is_differentiable(x: Tensor) -> bool:
    """Return whether a tensor of this type can have a derivative: floating-point or complex."""
    return x.is_floating_point() or x.is_complex()


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensor leaves of a pytree."""
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of a pytree; None is a leaf."""
    return pytree.tree_leaves(tree)


def sealed(tree: Any) -> dict[str, list[Tensor]]:
    """Return the tensors in leaves that torch does not know as containers, by the leaf's type.

    Such are dataclasses, `UserDict`, `BatchEncoding`, subclasses of dict and list, and any object
    with attributes. No derivative by these tensors can be found, and they cannot be stacked.

    Example:
        >>> from collections import UserDict
        >>> sealed({"x": torch.ones(2), "batch": UserDict(y=torch.ones(1))})
        {'UserDict': [tensor([1.])]}
    """
    found = {type(x).__name__: _inside(x, 3) for x in pytree.tree_leaves(tree)}
    return {name: inside for name, inside in found.items() if inside}


def _inside(x: Any, depth: int) -> list[Tensor]:
    if isinstance(x, Tensor | str | bytes | type) or callable(x) or depth == 0:
        return []
    if isinstance(x, Mapping):
        parts = list(x.values())
    elif isinstance(x, list | tuple | set | frozenset):
        parts = list(x)
    else:
        slots = getattr(type(x), "__slots__", ())
        names = [*getattr(x, "__dict__", ()), *([slots] if isinstance(slots, str) else slots)]
        parts = [getattr(x, name, None) for name in names]
    leaves = [leaf for part in parts for leaf in pytree.tree_leaves(part)]
    return [
        t
        for leaf in leaves
        for t in ([leaf] if isinstance(leaf, Tensor) else _inside(leaf, depth - 1))
    ]


def partition(
    tree: Any, keep: Callable[[Tensor], bool] = lambda _: True
) -> tuple[list[Tensor], Callable[[Any], Any]]:
    """Split a pytree into the tensors that satisfy `keep` and a function that puts it together.

    Example:
        >>> leaves, rebuild = partition({"x": torch.ones(2), "n": 3})
        >>> rebuild([2 * leaves[0]])
        {'x': tensor([2., 2.]), 'n': 3}
    """
    leaves, spec = pytree.tree_flatten(tree)
    chosen = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and keep(x)]
    picked = [leaves[i] for i in chosen]
    rest = [None if i in set(chosen) else x for i, x in enumerate(leaves)]

    def rebuild(new: Any) -> Any:
        merged = list(rest)
        for i, x in zip(chosen, new, strict=True):
            merged[i] = x
        return pytree.tree_unflatten(merged, spec)

    return picked, rebuild
