"""FSDP2 where ranks share sequences: gradients are summed in a group, and averaged over groups."""

from __future__ import annotations

import weakref
from typing import Any

import torch.distributed as dist
from torch import nn

from metafocus.errors import ProblemError
from metafocus.parallel.collectives import Group
from metafocus.parallel.sequence import size_of

_SET: weakref.WeakKeyDictionary[nn.Module, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def average_over_groups(model: nn.Module, group: Group) -> None:
    """Let FSDP2 divide gradients by the number of sequence groups, not by that of processes.

    Each rank of a group then adds the gradient of its share of the tokens. Call it once, after
    `fully_shard` and before the first loss with this `sequence_group`.

    Args:
        model: sharded by `fully_shard`, over a mesh of all ranks.
        group: the ranks that share each sequence; None changes nothing.

    Raises:
        ProblemError: for a model that `fully_shard` has not sharded.

    Example:
        >>> average_over_groups(nn.Linear(2, 2), None)
    """
    if group is None:
        return
    # Slow to import.
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    weights: list[Any] = [p for p in model.parameters() if hasattr(p, "device_mesh")]
    if not sharded or not weights:
        raise ProblemError(
            f"model {type(model).__name__} is not sharded by fully_shard: call fully_shard(model) "
            "first. Under DDP, or without a wrapper, there is nothing to set."
        )
    for module in sharded:
        module.set_gradient_divide_factor(weights[0].device_mesh.size() / size_of(group))
    _SET[model] = group


def averages_over_groups(model: nn.Module, group: Group) -> bool:
    """Return whether `average_over_groups(model, group)` was called."""
    return group is None or _SET.get(model) is group
