"""Collectives that are differentiable to any order: the derivative of each is another of them.

Ranks that share one computation hold two kinds of values. A *replicated* value is the same on all
ranks, and so is its derivative: the fast weights, a loss summed over the ranks. Of a *divided* one,
each rank holds its own share, and its derivative is that of the one common loss by this share:
hidden states, and what a rank computes from replicated weights and its share of the tokens.

| | from | to | derivative |
|---|---|---|---|
| `replicated` | replicated | divided | `summed` |
| `summed` | divided | replicated | `replicated` |
| `exchanged` | divided | divided | `exchanged`, the other way round |

All ranks of a group must call them in the same order. Backward passes keep that order, because
torch differentiates the same graph in the same order on every rank. Where graphs may differ,
`replicated_together` keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from metafocus.errors import ProblemError, TransformError

Group: TypeAlias = "dist.ProcessGroup | None"
"""The ranks that take part; None is this rank alone, where every collective is the identity."""


def replicated(x: Tensor, group: Group) -> Tensor:
    """Return `x` itself; its derivative is summed over the ranks.

    It belongs where a value that all ranks hold (mostly weights) enters what each rank computes
    with its own share of the data.

    Args:
        x: the same on every rank.
        group: the ranks; None: this one alone.

    Raises:
        TransformError: under `vmap` and in forward mode, here and in the derivatives.

    Example:
        >>> replicated(torch.ones(2), None)
        tensor([1., 1.])
    """
    return x if group is None else _Replicated.apply(x, group)  # pyright: ignore


def summed(x: Tensor, group: Group) -> Tensor:
    """Return the sum of `x` over the ranks; its derivative is passed on as it is.

    Args:
        x: of this rank.
        group: the ranks; None: this one alone.

    Raises:
        TransformError: under `vmap` and in forward mode, here and in the derivatives.

    Example:
        >>> summed(torch.ones(2), None)
        tensor([1., 1.])
    """
    return x if group is None else _Summed.apply(x, group)  # pyright: ignore


def replicated_together(xs: Sequence[Tensor], group: Group) -> tuple[list[Tensor], Tensor]:
    """Return `replicated` of several tensors, and a zero for the loss that is made of them.

    Ranks may need different ones of the tensors, and collectives that they call in different
    orders would mix up the tensors. Here the sums are taken in one node of the graph, all of them
    in order. The zero, added to the loss, leads every rank to this node.

    Raises:
        TransformError: under `vmap` and in forward mode, here and in the derivatives.

    Example:
        >>> replicated_together([torch.ones(2)], None)
        ([tensor([1., 1.])], tensor(0.))
    """
    if group is None or not xs:
        return list(xs), torch.zeros(())
    zero = torch.zeros((), device=xs[0].device)
    *found, zero = _Together.apply(group, False, *xs, zero)  # pyright: ignore
    return found, zero


def exchanged(x: Tensor, group: Group, *, scatter: int, gather: int) -> Tensor:
    """Cut `x` along one dimension, give each rank its part, and join what came along another one.

    With `scatter=1, gather=2`, `[B, H, S / n, D]` becomes `[B, H / n, S, D]` on `n` ranks. Parts
    are in the order of the ranks.

    Args:
        x: of the same shape on every rank.
        group: the ranks; None: this one alone.
        scatter: the dimension that is cut.
        gather: the dimension that is joined.

    Raises:
        ProblemError: if the number of ranks does not divide the size of the dimension that is cut.
        TransformError: under `vmap` and in forward mode, here and in the derivatives.

    Example:
        >>> exchanged(torch.ones(1, 4, 2), None, scatter=1, gather=2).shape
        torch.Size([1, 4, 2])
    """
    if group is None:
        return x
    ranks = dist.get_world_size(group)
    if x.shape[scatter] % ranks:
        raise ProblemError(
            f"dimension {scatter} of {list(x.shape)} cannot be cut into {ranks} equal parts, one "
            "for each rank."
        )
    return _Exchanged.apply(x, group, scatter, gather)  # pyright: ignore


def share_of_tasks(count: int, group: Group) -> float:
    """Return the share that this rank's tasks have in those of all ranks.

    Raises:
        ProblemError: on every rank, if one has no tasks.

    Example:
        >>> share_of_tasks(3, None)
        1.0
    """
    if group is None:
        return 1.0
    counts: list[int] = [0] * dist.get_world_size(group)
    dist.all_gather_object(counts, count, group=group)
    if not all(counts):
        raise ProblemError(
            f"the ranks have {counts} tasks: each needs one at least, to take part in the mean. "
            "Use fewer ranks, or larger batches of tasks."
        )
    return count / sum(counts)


class _Collective(torch.autograd.Function):
    """What all have in common: no rule for `vmap`, and none for forward mode."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise TransformError(
            "vmap (mf.over_tasks) over a computation that several ranks share is not supported: "
            "take one task after another, and add their gradients."
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise TransformError(
            "forward mode (torch.func.jvp, hvp=mf.hvp_forward) through a computation that several "
            "ranks share is not supported: use hvp=mf.hvp_reverse or mf.hvp_finite()."
        )


class _Replicated(_Collective):
    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return summed(cotangents[0], ctx.group), None


class _Summed(_Collective):
    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return replicated(cotangents[0], ctx.group), None


class _Together(_Collective):
    """Many tensors at once: `summed` of each, or `replicated`."""

    @staticmethod
    def forward(group: dist.ProcessGroup, total: bool, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_Summed.forward(x, group) if total else x.view_as(x) for x in xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group, ctx.total, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, None, *_Together.apply(ctx.group, not ctx.total, *cotangents)  # pyright: ignore


class _Exchanged(_Collective):
    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup, scatter: int, gather: int) -> Tensor:
        parts = torch.stack(x.chunk(dist.get_world_size(group), scatter))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return torch.cat(received.unbind(), gather)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.group, ctx.scatter, ctx.gather = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        back = exchanged(cotangents[0], ctx.group, scatter=ctx.gather, gather=ctx.scatter)
        return back, None, None, None
