"""Where kept states live: on their device or in the memory of the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Shelf(Protocol):
    """The kept states of one run; the key is the number of the next step."""

    def put(self, key: int, tensors: Sequence[Tensor]) -> None:
        """Keep the tensors of a state."""
        ...

    def get(self, key: int) -> list[Tensor]:
        """Return them as they were: same values, type, device and strides."""
        ...

    def drop(self, key: int) -> None:
        """Forget a state."""
        ...

    def close(self) -> None:
        """Forget all states; may be called twice."""
        ...


class Place(Protocol):
    """Where states live."""

    def open(self) -> Shelf:
        """Return an empty shelf for one run."""
        ...


@dataclass(frozen=True)
class Device:
    """Keep states where they are."""

    def open(self) -> Shelf:
        """Return an empty shelf."""
        return _Kept()


@dataclass(frozen=True)
class Host:
    """Keep states in the memory of the host: pinned, without waiting for the copies."""

    def open(self) -> Shelf:
        """Return an empty shelf."""
        return _OnHost()


class _Kept:
    def __init__(self) -> None:
        self.states: dict[int, list[Tensor]] = {}

    def put(self, key: int, tensors: Sequence[Tensor]) -> None:
        self.states[key] = list(tensors)

    def get(self, key: int) -> list[Tensor]:
        return self.states[key]

    def drop(self, key: int) -> None:
        del self.states[key]

    def close(self) -> None:
        self.states.clear()


class _OnHost(_Kept):
    def __init__(self) -> None:
        super().__init__()
        self.devices: dict[int, list[torch.device]] = {}

    def put(self, key: int, tensors: Sequence[Tensor]) -> None:
        # Both copies are queued on the stream that computes, so they need no wait; torch keeps
        # pinned memory until the copies that use it are done.
        self.devices[key] = [x.device for x in tensors]
        self.states[key] = [_to_host(x) for x in tensors]

    def get(self, key: int) -> list[Tensor]:
        places = zip(self.states[key], self.devices[key], strict=True)
        return [x.to(device, non_blocking=True) for x, device in places]

    def drop(self, key: int) -> None:
        super().drop(key)
        del self.devices[key]


def _to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x
    pinned = x.device.type == "cuda"
    return torch.empty_like(x, device="cpu", pin_memory=pinned).copy_(x, non_blocking=pinned)
