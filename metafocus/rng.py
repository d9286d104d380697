"""Random numbers: kept around a trial, drawn again in a rebuild, put back after an error."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.calls import Scoped, inside


class Drawn:
    """The random state at one moment, to draw the same numbers again.

    Args:
        near: tensors whose devices count.
    """

    def __init__(self, near: Iterable[Tensor]):
        self.devices = _devices(near)
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(d) for d in self.devices]

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


_SAVED: Scoped[dict[torch.Generator, Tensor] | None] = Scoped(None)


@contextlib.contextmanager
def attempt(near: Iterable[Tensor], generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Run a call from outside; after an error random generators are as they were before it.

    An attempt inside another one is a part of it.

    Args:
        near: tensors whose devices count.
        generators: from which the call draws.
    """
    saved = _SAVED.get()
    if saved is not None or torch.compiler.is_compiling():
        for generator in generators:
            draws_from(generator)
        yield
        return
    before, saved = Drawn(near), {g: g.get_state() for g in generators}
    with inside(), _SAVED.set(saved):
        try:
            yield
        except BaseException:
            before.put_back()
            for generator, state in saved.items():
                generator.set_state(state)
            raise


def draws_from(generator: torch.Generator) -> None:
    """Let the attempt that runs put a generator back after an error; call it before a draw."""
    saved = None if torch.compiler.is_compiling() else _SAVED.get()
    if saved is not None and generator not in saved:
        saved[generator] = generator.get_state()


def attempted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function or method that is an `attempt`, near its arguments."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        generators = [x for x in given if isinstance(x, torch.Generator)]
        with attempt(pt.tensors(given), generators):
            return function(*args, **kwargs)

    return run


def _devices(near: Iterable[Tensor]) -> list[int]:
    return sorted({x.get_device() for x in near if x.is_cuda})
