"""What results on the tape depend on: leaves of others, and kernels that are not ATen's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from metafocus.torch_internals import forward_class, innermost


def foreign_leaves(result: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves that a tensor of the tape depends on and that are not among `own`.

    Under `vmap` the tape holds what the batched tensors wrap.
    """
    own = [*own, *map(innermost, own)]
    mine = {id(x) for x in own}
    if result.grad_fn is None:
        return [] if not result.requires_grad or id(result) in mine else [result]
    # Only the node of a leaf has a variable.
    found = [getattr(node, "variable", None) for node in _nodes([result])]
    return [leaf for leaf in found if leaf is not None and id(leaf) not in mine]


def is_cut_off(result: Tensor, most: int = 2000) -> bool:
    """Return whether a tensor of the tape depends on no leaf but those of the engine's own.

    False for a graph of more than `most` nodes: in torch 2.13 a node that Python has looked at is
    freed by a call inside the call that frees the node before it, so that thousands overflow the
    stack.
    """
    nodes = list(islice(_nodes([result]), most + 1))
    leaves = [leaf for node in nodes if (leaf := getattr(node, "variable", None)) is not None]
    return len(nodes) <= most and all(hasattr(x, "engine_leaf") for x in leaves)


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


def _nodes(results: Iterable[Tensor]) -> Iterator[Any]:
    seen, pending = set(), [x.grad_fn for x in results if x.grad_fn is not None]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        pending += [parent for parent, _ in node.next_functions if parent is not None]
