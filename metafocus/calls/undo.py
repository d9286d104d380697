"""What is undone when a block is over, by its exit or else by the next call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

from metafocus.calls.blocks import Block, with_block

LOCK = threading.RLock()

_OPEN: list[_Undo] = []


def undone(undo: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
    """Return a block after which `undo()` runs; running it twice must do no harm."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _undone(undo)


@with_block
def _undone(undo: Callable[[], object], *, block: Block) -> Iterator[None]:
    mine = _Undo(block, undo)
    try:
        with LOCK:
            _OPEN.append(mine)
        yield
    finally:
        with LOCK:
            if mine in _OPEN:
                # What is newer and was not undone is undone first.
                settle(_OPEN.index(mine) + 1)
                mine.run()


class _Undo:
    """What remains to be done when a block is over."""

    def __init__(self, block: Block, undo: Callable[[], object]):
        self.block = block
        self.undo = undo

    def run(self) -> None:
        """Do it, and then forget it."""
        self.undo()
        # The garbage collector may close a block while it is being undone.
        if self in _OPEN:
            _OPEN.remove(self)


def settle(since: int = 0) -> None:
    """Undo what interrupted exits have left, the newest first."""
    if _OPEN:
        with LOCK:
            for left in reversed(_OPEN[since:]):
                if left.block.over:
                    left.run()
