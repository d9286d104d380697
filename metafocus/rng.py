"""Random numbers: kept as they are around a trial, and drawn again in a rebuild."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class Drawn:
    """The random state at one moment, to draw the same numbers again.

    Args:
        near: tensors whose devices count.
    """

    def __init__(self, near: Iterable[Tensor]):
        self.devices = _devices(near) if near else []
        self.cpu = torch.default_generator.get_state()
        self.cuda = [torch.cuda.get_rng_state(d) for d in self.devices]

    def or_same(self, earlier: Drawn | None) -> Drawn:
        """Return `earlier` if nothing was drawn since, so that one copy serves for both."""
        if earlier is None or self.devices != earlier.devices:
            return self
        mine, others = [self.cpu, *self.cuda], [earlier.cpu, *earlier.cuda]
        return earlier if all(map(torch.equal, mine, others)) else self

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


@contextlib.contextmanager
def kept(near: Iterable[Tensor]) -> Iterator[None]:
    """Leave the global random state as it was, whatever is drawn inside a `with` block.

    Args:
        near: tensors whose devices count.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with torch.random.fork_rng(_devices(near)):
        yield


def replayed(fn: Callable[..., Any], near: Iterable[Tensor]) -> Callable[..., Any]:
    """Return `fn`, but each call draws the random numbers that a call now would draw.

    Linearising a loss with dropout at one point means one mask for every product.

    Args:
        fn: any function.
        near: tensors whose devices count.
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
