"""What results on the tape depend on: leaves of others, and kernels that are not ATen's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from metafocus.torch_internals import created_first, forward_class, innermost


def foreign_leaves(result: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves that a tensor of the tape depends on and that are not among `own`.

    Under `vmap` the tape holds what the batched tensors wrap.
    """
    own = [*own, *map(innermost, own)]
    mine = {id(x) for x in own}
    if result.grad_fn is None:
        return [] if not result.requires_grad or id(result) in mine else [result]
    # Only the node of a leaf has a variable.
    ends = (node for node in _nodes([result]) if not node.next_functions)
    found = [getattr(node, "variable", None) for node in ends]
    return [leaf for leaf in found if leaf is not None and id(leaf) not in mine]


def foreign_nodes(results: Iterable[Tensor]) -> list[str]:
    """Return the names of custom kernels that tensors of the tape depend on.

    Nodes of ATen's own, of torch.distributed and of this package have all derivatives.
    """
    return sorted({n.name() for n in _nodes(results) if not _has_all_derivatives(n)})


def has_custom_nodes(results: Iterable[Tensor]) -> bool:
    """Return whether tensors of the tape depend on a custom Function, of this package or not."""
    return any(forward_class(node) is not None for node in _nodes(results))


_ATEN_NODE = re.compile(r"(Backward\d+|AccumulateGrad|CopyBackwards|CopySlices|Barrier|Error)$")


def _has_all_derivatives(node: Any) -> bool:
    custom = forward_class(node)
    if custom is not None:
        return custom.__module__.startswith(("metafocus.", "torch.distributed."))
    return bool(_ATEN_NODE.search(node.name()))


def _nodes(results: Iterable[Tensor]) -> set[Any]:
    roots: set[Any] = {x.grad_fn for x in results if x.grad_fn is not None}
    found = _reached(roots)
    if len(found) > _MANY:
        for root in roots:
            # A list is freed from its end on: each node before those that it leads to.
            root.metadata["metafocus: freed"] = created_first(_reached({root}) - {root})
    return found


_MANY = 2000
"""Since torch 2.13 a node that Python has looked at is freed by a call inside the call that frees
the node before it. From some 10,000 nodes on that overflows the stack, so the end of a long graph
keeps the others, in an order that frees them one by one."""


def _reached(roots: set[Any]) -> set[Any]:
    seen, pending = set(roots), list(roots)
    while pending:
        for node, _ in pending.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                pending.append(node)
    return seen
