"""Blocks that know whether they are over: variables that last as long, and what is undone after."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import GeneratorType
from typing import Any, Generic, NamedTuple, TypeVar

import torch

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


class _Entry:
    __slots__ = ("block", "previous", "value")

    def __init__(self, value: Any, block: Block, previous: _Entry | None):
        self.value, self.block, self.previous = value, block, previous


class Scoped(Generic[T]):
    """A variable of this thread that holds a value while a `with` block is open.

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
        entry = self._entry.get()
        if entry is not None:
            entry = self._open()
        return self._default if entry is None else entry.value

    def set(self, value: T) -> contextlib.AbstractContextManager[None]:
        """Return a block in which the variable has this value."""
        return _set(self, value)

    def begin(self, value: T, block: Block) -> Callable[[], None]:
        """Let the variable have a value until a block is over; return what its exit calls."""
        entry = _Entry(value, block, self._open())
        self._entry.set(entry)

        def end() -> None:
            # A block that the garbage collector closes may end in another thread.
            if self._entry.get() is entry:
                self._entry.set(entry.previous)

        return end

    def _open(self) -> _Entry | None:
        entry = self._entry.get()
        while entry is not None and entry.block.over:
            entry = entry.previous
        return entry


@with_block
def _set(variable: Scoped[Any], value: Any, *, block: Block) -> Iterator[None]:
    end = variable.begin(value, block)
    try:
        yield
    finally:
        end()


class _Undo(NamedTuple):
    """What remains to be done when a block is over."""

    block: Block
    undo: Callable[[], object]


LOCK = threading.RLock()
"""Held while the changes and the owners of all threads are looked at."""

_UNDO: list[_Undo] = []


def undone(undo: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
    """Return a block after which `undo()` runs; running it twice must do no harm."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _undone(undo)


@with_block
def _undone(undo: Callable[[], object], *, block: Block) -> Iterator[None]:
    mine = _Undo(block, undo)
    try:
        with LOCK:
            _UNDO.append(mine)
        yield
    finally:
        with LOCK:
            if mine in _UNDO:
                # What is newer and was not undone is undone first.
                settle(_UNDO.index(mine) + 1)
                _finish(mine)


def settle(since: int = 0) -> None:
    """Undo what interrupted exits have left, the newest first."""
    if _UNDO:
        with LOCK:
            for left in reversed(_UNDO[since:]):
                if left.block.over:
                    _finish(left)


def _finish(left: _Undo) -> None:
    left.undo()
    # The garbage collector may close a block while it is being undone.
    if left in _UNDO:
        _UNDO.remove(left)
