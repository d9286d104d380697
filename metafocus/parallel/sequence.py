"""One sequence on several ranks: who they are, and which tokens each of them has."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from metafocus.checks import whole
from metafocus.errors import DataError, ProblemError
from metafocus.parallel.collectives import Group
from metafocus.torch_internals import assert_later


def sequence_group(size: int, *, timeout: timedelta | None = None) -> Group:
    """Return the ranks that share a sequence with this one: `size` consecutive ranks of the world.

    Call it once, on every rank. All ranks of a group must be given the same batches; the number of
    groups, `world_size / size`, is the degree of data parallelism.

    Args:
        size: the degree of sequence parallelism; 1: sequences are not divided.
        timeout: how long a rank waits for the others of its group before it ends with an error;
            default: as torch.distributed has it, minutes.

    Returns:
        The process group; None for `size=1`.

    Raises:
        ProblemError: if torch.distributed is not initialised, or `size` does not divide the number
            of ranks.

    Example:
        >>> sequence_group(1) is None
        True
    """
    whole("sequence_group: size", size, 1, error=ProblemError)
    if size == 1:
        return None
    if not dist.is_initialized():
        raise ProblemError(
            f"size={size} ranks cannot share a sequence: this process is alone. Start it with "
            "torchrun --nproc-per-node=N, and call torch.distributed.init_process_group() first."
        )
    world = dist.get_world_size()
    if world % size:
        raise ProblemError(
            f"size={size} does not divide the {world} ranks that were started: every rank must "
            "belong to a group of this size."
        )
    found: Any = dist.new_subgroups(size, timeout=timeout)[0]
    return found


def size_of(group: Group) -> int:
    """Return the number of ranks in a group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def whole_length(x: Tensor, group: Group, fill: int) -> Tensor:
    """Return `[..., S]` padded at its end, to the length that the ranks divide evenly.

    Args:
        x: the same on every rank.
        group: the ranks.
        fill: what the padding holds.

    Example:
        >>> whole_length(torch.ones(1, 3), None, 0).shape
        torch.Size([1, 3])
    """
    missing = -x.shape[-1] % size_of(group)
    return F.pad(x, (0, missing), value=fill) if missing else x


def share(x: Tensor, group: Group, fill: int) -> Tensor:
    """Return this rank's part of `[..., S]`: `ceil(S / ranks)` consecutive entries.

    Args:
        x: the same on every rank.
        group: the ranks.
        fill: the value beyond the end of the sequence.

    Example:
        >>> share(torch.arange(3), None, 0)
        tensor([0, 1, 2])
    """
    if group is None:
        return x
    return whole_length(x, group, fill).chunk(size_of(group), -1)[dist.get_rank(group)]


def refuse_other_batches(batch: Mapping[str, Any], group: Group) -> None:
    """Raise on every rank of a group if they were given different batches.

    One all-reduce of three numbers; on CUDA the check is queued and does not wait.

    Args:
        batch: tensors by name; only integer and boolean ones are compared, by a checksum.
        group: the ranks.

    Raises:
        DataError: naming the fix.
    """
    if group is None:
        return
    ids = batch["input_ids"]
    total = torch.zeros((), dtype=torch.int64, device=ids.device)
    for name in sorted(batch):
        x = batch[name]
        if isinstance(x, Tensor) and not x.is_floating_point():
            place = torch.arange(1, x.numel() + 1, device=x.device)
            # Wraps around on every rank alike.
            total = total * 31 + (x.flatten().long() * place).sum()
    sizes = torch.tensor([*ids.shape[-2:]], device=ids.device)
    _refuse_unlike(
        torch.cat([sizes, total[None]]),
        group,
        "were given different batches. Give each rank of a group the same batch: shard the data by "
        "rank // size, not by rank",
    )


def refuse_other_starts(fast: Mapping[str, Tensor], group: Group) -> None:
    """Raise on every rank of a group if their fast weights start at different values.

    Args:
        fast: the fast weights before the first step; compared by their sums.
        group: the ranks.

    Raises:
        DataError: naming the fix.
    """
    if group is None or not fast:
        return
    sums = torch.stack([x.detach().double().sum() for x in fast.values()])
    _refuse_unlike(
        sums,
        group,
        "start at different fast weights. Give each rank of a group a generator of the same seed",
    )


def _refuse_unlike(values: Tensor, group: Group, message: str) -> None:
    bounds = torch.stack([values, -values])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    # Every rank sees the largest and the smallest value; NaN is left to other checks.
    differ = (bounds[0] > -bounds[1]).any()
    text = f"the {size_of(group)} ranks that share a sequence {message}"
    if values.is_cuda:
        assert_later(~differ, text)
    elif bool(differ):
        raise DataError(f"{text}.")
