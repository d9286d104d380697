"""Who owns a model: one call until its end, in any thread that continues it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from metafocus.calls.blocks import LOCK, Block, Scoped, settle, undone, with_block
from metafocus.errors import ProblemError


class Call:
    """One call from outside, the token that owns models; several threads may continue it.

    Attributes:
        blocks: it lasts as long as any of these.
        notes: what is written down for `mf.explain`, by topic; None: nothing is.
    """

    __slots__ = ("blocks", "notes")

    def __init__(self) -> None:
        self.blocks: tuple[Block, ...] = ()
        self.notes: dict[str, list[str]] | None = None

    @property
    def over(self) -> bool:
        """Whether the call runs nowhere any more."""
        return all(block.over for block in self.blocks)


_CURRENT: Scoped[Call | None] = Scoped(None)
_OWNERS: dict[int, tuple[object, Call]] = {}
_RUNNING: set[int] = set()


def current() -> Call | None:
    """Return the call that this thread is in, if any."""
    return None if torch.compiler.is_compiling() else _CURRENT.get()


def inside(carried: Call | None = None) -> contextlib.AbstractContextManager[Any]:
    """Return a block inside a call: the current one, or else a new one.

    Args:
        carried: the call that made a graph, while this graph is differentiated. If it is not over,
            it waits for this backward pass, which may be in another thread.
    """
    if torch.compiler.is_compiling() or _joins(carried) is None:
        return contextlib.nullcontext()
    return _inside(carried)


@with_block
def _inside(carried: Call | None, *, block: Block) -> Iterator[None]:
    leave = enter(carried, block)
    try:
        yield
    finally:
        leave()


def enter(carried: Call | None, block: Block) -> Callable[[], None]:
    """Begin what `inside` describes, until a block is over; return what its exit calls."""
    call = _joins(carried)
    if call is None:
        return _nothing
    if call is carried:
        # A graph may be differentiated in several threads.
        with LOCK:
            call.blocks = (block, *(b for b in call.blocks if not b.over))
    else:
        call.blocks = (block,)
    end = _CURRENT.begin(call, block)
    settle()

    def leave() -> None:
        settle()
        if _OWNERS:
            _forget(block)
        end()

    return leave


def _joins(carried: Call | None) -> Call | None:
    """Return the call that a block begins or joins; None if it stays in the current one."""
    now = _CURRENT.get()
    if carried is None or carried is now or carried.over:
        return None if now is not None else carried or Call()
    return carried


def _nothing() -> None: ...


def _forget(left: Block) -> None:
    """Forget what calls have owned that are over, but for a block that is being left."""
    with LOCK:
        for key, (_, call) in list(_OWNERS.items()):
            if all(block is left or block.over for block in call.blocks):
                del _OWNERS[key]


def own(thing: object, what: str) -> None:
    """Let the current call own a thing until it is over.

    Raises:
        ProblemError: if another call owns it.
    """
    call = current()
    assert call is not None
    with LOCK:
        _, owner = _OWNERS.get(id(thing), (None, call))
        if owner is not call and not owner.over:
            _refuse(what)
        _OWNERS[id(thing)] = thing, call


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
        own(model, f"the model ({type(model).__name__})")
        yield


def refuse_nested(model: nn.Module) -> None:
    """Raise if a forward pass of a model is under way in the call that asks."""
    if id(model) in _RUNNING:
        raise ProblemError(
            f"the loss of a {type(model).__name__} was called from inside its own forward pass "
            "(by a hook, a module or a token policy), while the model is changed for the first "
            "call. Call it before or after, or on a copy: copy.deepcopy(model)."
        )


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Take a model for one forward pass, which nothing may begin again from inside.

    Raises:
        ProblemError: if another call has the model, or if the model runs already.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with using(model):
        settle()
        refuse_nested(model)
        with undone(partial(_RUNNING.discard, id(model))):
            _RUNNING.add(id(model))
            yield


def _refuse(what: str) -> NoReturn:
    raise ProblemError(
        f"{what} is in use by another call, in another thread or task. A call changes the model "
        "while it runs, so make one call at a time, or give each its own: copy.deepcopy(model)."
    )
