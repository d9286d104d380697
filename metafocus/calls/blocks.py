"""Blocks that know whether they are over, and variables that last as long as a block."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import GeneratorType
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Block:
    """A `with` block that can be asked whether it is over.

    It is over when its generator is finished. That is also true after an exception inside the exit,
    which a flag that the exit sets would miss.
    """

    __slots__ = ("generator",)

    def __init__(self) -> None:
        self.generator: weakref.ref[GeneratorType[Any, Any, Any]] | None = None

    @property
    def over(self) -> bool:
        """Whether the block has been left."""
        generator = None if self.generator is None else self.generator()
        return generator is None or generator.gi_frame is None


def with_block(
    function: Callable[..., Iterator[T]],
) -> Callable[..., contextlib.AbstractContextManager[T]]:
    """Return `contextlib.contextmanager(function)`, which gives the function its own `block`."""
    make = contextlib.contextmanager(function)

    @functools.wraps(function)
    def enter(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[T]:
        block = Block()
        manager: Any = make(*args, block=block, **kwargs)
        # Weak: a block that is dropped before its exit ran is closed at once, and so undone.
        block.generator = weakref.ref(manager.gen)
        return manager

    return enter


class _Entry(NamedTuple):
    value: Any
    block: Block
    previous: _Entry | None


class Scoped(Generic[T]):
    """A variable of this thread that holds a value while a `with` block is open.

    Args:
        default: the value outside of any block.

    Example:
        >>> depth = Scoped(0)
        >>> with depth.set(1):
        ...     print(depth.get())
        1
        >>> depth.get()
        0
    """

    def __init__(self, default: T):
        self._default = default
        self._entry: ContextVar[_Entry | None] = ContextVar("entry", default=None)

    def get(self) -> T:
        """Return the value of the innermost block that is open."""
        entry = self._open()
        return self._default if entry is None else entry.value

    def set(self, value: T) -> contextlib.AbstractContextManager[None]:
        """Return a block in which the variable has this value."""
        return _set(self, value)

    def _open(self) -> _Entry | None:
        entry = self._entry.get()
        while entry is not None and entry.block.over:
            entry = entry.previous
        return entry


@with_block
def _set(variable: Scoped[Any], value: Any, *, block: Block) -> Iterator[None]:
    entry = _Entry(value, block, variable._open())
    try:
        variable._entry.set(entry)
        yield
    finally:
        # A block that the garbage collector closes may end in another thread.
        if variable._entry.get() is entry:
            variable._entry.set(entry.previous)
