"""Several processes of one command under torchrun: shares of the work, and what all have found."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from metafocus.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that were started together.

    Example:
        >>> Ranks(1, 2).mine([10, 11, 12, 13, 14])
        [11, 13]
    """

    rank: int
    count: int

    @property
    def first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """Return this process's share."""
        return list(items[self.rank :: self.count])

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes; it waits for them."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def after_first(self, act: Callable[[], T]) -> T:
        """Return `act()`, which the first process does before the others begin.

        Raises:
            DataError: on every process, if it fails on the first.
        """
        result, error = None, None
        if self.first:
            try:
                result = act()
            except DataError as reason:
                error = str(reason)
        error = self.gathered(error)[0]
        if error is not None:
            raise DataError(error)
        return result if self.first else act()  # pyright: ignore[reportReturnType]

    def device(self, name: str) -> str:
        """Return the device of this process: of `cuda`, one of its own."""
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return f"{name}:{local}" if self.count > 1 and name == "cuda" else name


ALONE = Ranks(0, 1)
"""One process."""


def ranks() -> Ranks:
    """Return the processes that torchrun started, joined over gloo; without it, this one alone.

    Example:
        >>> ranks()
        Ranks(rank=0, count=1)
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    import torch.distributed as dist

    if not dist.is_initialized():
        # What is exchanged are answers and figures, not tensors of a device.
        dist.init_process_group("gloo")
    return Ranks(dist.get_rank(), count)


def refuse_ranks(command: str, way_out: str = "start it without torchrun") -> None:
    """Raise for a command that would do all of its work in each of several processes."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise DataError(
            f"metafocus {command} would do the same work in each of {count} processes: {way_out}."
        )
