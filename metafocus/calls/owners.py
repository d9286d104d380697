"""Who owns a model: one call, until that is over, in whatever thread it goes on."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import nn

from metafocus.calls.blocks import Block, Scoped, with_block
from metafocus.calls.undo import LOCK, settle
from metafocus.errors import ProblemError


class Call:
    """One call from outside, the token that owns models; it may go on in several threads."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []

    @property
    def over(self) -> bool:
        """Whether the call runs nowhere any more."""
        return all(block.over for block in self._blocks)

    def goes_on(self, block: Block) -> None:
        """Let the call last as long as a block."""
        self._blocks = [b for b in self._blocks if not b.over] + [block]


_CURRENT: Scoped[Call | None] = Scoped(None)
_OWNERS: weakref.WeakKeyDictionary[nn.Module, Call] = weakref.WeakKeyDictionary()


def current() -> Call | None:
    """Return the call that this thread is in, if any."""
    return None if torch.compiler.is_compiling() else _CURRENT.get()


def inside(carried: Call | None = None) -> contextlib.AbstractContextManager[Any]:
    """Return a block inside a call: the current one, or else a new one.

    Args:
        carried: the call that made a graph, while this graph is differentiated.
    """
    if torch.compiler.is_compiling() or (carried is None and current() is not None):
        return contextlib.nullcontext()
    return _inside(carried)


@with_block
def _inside(carried: Call | None, *, block: Block) -> Iterator[None]:
    now = _CURRENT.get()
    mine = now or carried or Call()
    if carried is not None and not carried.over:
        # The call waits for this backward pass, which may be in another thread.
        mine = carried
    if mine is now:
        yield
        return
    mine.goes_on(block)
    with _CURRENT.set(mine):
        settle()
        try:
            yield
        finally:
            settle()


@contextlib.contextmanager
def using(model: nn.Module) -> Iterator[None]:
    """Take a model for the current call, or for this block if there is none.

    Args:
        model: what the call changes; it keeps the model until it is over.

    Raises:
        ProblemError: if another call has the model.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with inside():
        with LOCK:
            owner = _OWNERS.get(model)
            if owner is not None and owner is not current() and not owner.over:
                refuse(f"the model ({type(model).__name__})")
            call = current()
            assert call is not None
            _OWNERS[model] = call
        yield


def refuse(what: str) -> NoReturn:
    """Raise because another call has this, with the fix."""
    raise ProblemError(
        f"{what} is in use by another call, in another thread or task. A call changes the model "
        "while it runs, so make one call at a time, or give each its own: copy.deepcopy(model)."
    )
