"""Random numbers: kept as they are around a trial, and drawn again in a rebuild."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from metafocus.torch_internals import outside_transforms, tracing


class Drawn:
    """The random state at one moment, to draw the same numbers again."""

    def __init__(self, near: Iterable[Tensor]):
        self.devices: list[int] = _devices(near) if near else []
        self.cpu: Tensor = torch.default_generator.get_state()
        self.cuda: list[Tensor] = [torch.cuda.get_rng_state(d) for d in self.devices]

    @classmethod
    def shared(cls, near: Iterable[Tensor]) -> Drawn:
        """Return the random state now; one copy serves while nothing is drawn.

        A loop without random numbers then keeps one state of 5 kB and not one for each step.
        """
        now, latest = cls(near), _latest()
        if tracing():
            # A compiler would take the comparison into its graph.
            return now
        with outside_transforms():
            if latest is not None and now.equals(latest):
                return latest
        _remember(now)
        return now

    def equals(self, other: Drawn) -> bool:
        """Return whether nothing was drawn between two moments; outside of transforms."""
        # Random states lie on the host, those of a GPU too; arrays, since no mode need see it.
        mine, others = [self.cpu, *self.cuda], [other.cpu, *other.cuda]
        return self.devices == other.devices and all(
            bool((a.numpy() == b.numpy()).all()) for a, b in zip(mine, others, strict=True)
        )

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers inside a `with` block; leave the global state as it was."""
        with torch.random.fork_rng(self.devices):
            self.put_back()
            yield

    def put_back(self) -> None:
        """Let the next draws be those that followed this moment."""
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


_LATEST: weakref.ref[Drawn] | None = None
"""The state that was taken last, as long as somebody keeps it."""


def _latest() -> Drawn | None:
    return None if _LATEST is None else _LATEST()


def _remember(drawn: Drawn) -> None:
    global _LATEST
    _LATEST = weakref.ref(drawn)


@contextlib.contextmanager
def kept(near: Iterable[Tensor]) -> Iterator[None]:
    """Leave the global random state as it was, whatever is drawn inside a `with` block."""
    if torch.compiler.is_compiling():
        yield
        return
    with torch.random.fork_rng(_devices(near)):
        yield


def replayed(fn: Callable[..., Any], near: Iterable[Tensor]) -> Callable[..., Any]:
    """Return `fn`, but each call draws the random numbers that a call now would draw.

    Linearising a loss with dropout at one point means one mask for every product.
    """
    if torch.compiler.is_compiling():
        return fn
    drawn = Drawn(near)

    def again(*args: Any) -> Any:
        with drawn.again():
            return fn(*args)

    return again


def _devices(near: Iterable[Tensor]) -> list[int]:
    return sorted({x.get_device() for x in near if x.is_cuda})
