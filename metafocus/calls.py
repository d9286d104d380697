"""Calls: who changes a model for a while, and how everything is put back, whatever happens.

A call of this package changes what is not its own: it binds fast weights, replaces the attention
and the checkpointing of a model, and swaps parameters. Every such change is made by `changed` or
guarded by `undone`: it is recorded before it is made, and the record is dropped after it is undone.
What an interrupted exit leaves is therefore known, and the next call undoes it.

A `Call` owns the models that it uses until it is over. It is a token and not a thread: a graph
carries it, because CUDA runs a backward pass in another thread.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import GeneratorType
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from metafocus.errors import ProblemError
from metafocus.torch_internals import parameter_table, swapped_weights

T = TypeVar("T")
ABSENT: Any = object()
"""The value of an attribute or a key that does not exist."""


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
_RUNNING: dict[int, bool] = {}
_OPEN: dict[int, _Undo] = {}
_PLACES: dict[tuple[int, Any], list[_Change]] = {}
_LOCK = threading.RLock()


def current() -> Call | None:
    """Return the call that this thread is in, if any."""
    return None if torch.compiler.is_compiling() else _CURRENT.get()


def inside(carried: Call | None = None) -> contextlib.AbstractContextManager[Any]:
    """Return a block inside a call: the current one, or else a new one.

    Args:
        carried: the call that made a graph, while this graph is differentiated.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _inside(carried)


@with_block
def _inside(carried: Call | None, *, block: Block) -> Iterator[None]:
    now = _CURRENT.get()
    mine = now or carried or Call()
    if carried is not None and not carried.over:
        # The call waits for this backward pass, which may be in another thread.
        mine = carried
    mine.goes_on(block)
    if mine is now:
        yield
        return
    with _CURRENT.set(mine):
        settle()
        try:
            yield
        finally:
            settle()


def settle() -> None:
    """Undo what interrupted exits have left."""
    left = [undo for undo in list(_OPEN.values()) if undo.block.over]
    if left:
        with _LOCK:
            for undo in reversed(left):
                undo.run(late=True)


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
        with _LOCK:
            owner = _OWNERS.get(model)
            if owner is not None and owner is not current() and not owner.over:
                _refuse(f"the model ({type(model).__name__})")
            call = current()
            assert call is not None
            _OWNERS[model] = call
        yield


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
        if id(model) in _RUNNING:
            raise ProblemError(
                f"the loss of a {type(model).__name__} was called from inside its own forward pass "
                "(by a hook, a module or a token policy), while the model is changed for the first "
                "call. Call it before or after, or on a copy: copy.deepcopy(model)."
            )
        with changed((_RUNNING, id(model), True)):
            yield


def _refuse(what: str) -> NoReturn:
    raise ProblemError(
        f"{what} is in use by another call, in another thread or task. A call changes the model "
        "while it runs, so make one call at a time, or give each its own: copy.deepcopy(model)."
    )


def changed(*places: tuple[Any, Any, Any]) -> contextlib.AbstractContextManager[None]:
    """Return a block in which each `(target, name, value)` holds.

    Args:
        places: an object and the name of an attribute, or a dict and a key, each with the value
            in the block; `ABSENT` removes it there.

    Raises:
        ProblemError: if another call has changed one of the places.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with changed((layer, "training", False)):
        ...     print(layer.training)
        False
        >>> layer.training
        True
    """
    return _traced(places) if torch.compiler.is_compiling() else _changed(places)


@contextlib.contextmanager
def _traced(places: tuple[tuple[Any, Any, Any], ...]) -> Iterator[None]:
    before = [(target, name, _read(target, name)) for target, name, _ in places]
    try:
        for place in places:
            _write(*place)
        yield
    finally:
        for place in reversed(before):
            _write(*place)


@with_block
def _changed(places: tuple[tuple[Any, Any, Any], ...], *, block: Block) -> Iterator[None]:
    mine: list[_Change] = []
    with inside():
        try:
            for place in places:
                change = _Change(block, *place)
                mine.append(change)
                change.make()
            yield
        finally:
            for change in reversed(mine):
                change.run()


def evaluating(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a block in which a model is in evaluation mode, every module of it."""
    return changed(*((module, "training", False) for module in model.modules()))


@contextlib.contextmanager
def holding(
    module: nn.Module, tensors: Mapping[str, Tensor], *, tie_weights: bool = False
) -> Iterator[None]:
    """Let a module hold other tensors as parameters and buffers inside a `with` block.

    Args:
        module: as for `torch.func.functional_call`.
        tensors: by name; an empty dict changes nothing.
        tie_weights: whether tied weights are replaced together.
    """
    if not tensors:
        yield
        return
    swap = swapped_weights(module, tensors, tie_weights=tie_weights)
    if torch.compiler.is_compiling():
        with swap:
            yield
        return
    held = [
        (f"{path}.{name}" if path else name, m, name, value)
        for path, m in module.named_modules()
        for name, value in (*parameter_table(m).items(), *m.named_buffers(recurse=False))
    ]
    # Tied weights have several names.
    own = {id(value) for path, _, _, value in held if path in tensors}
    places = [place for _, *place in held if id(place[-1]) in own]

    def put_back() -> None:
        for m, name, value in places:
            if name in parameter_table(m):
                parameter_table(m)[name] = value
            else:
                setattr(m, name, value)

    with undone(put_back), swap:
        yield


def undone(undo: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
    """Return a block after which `undo()` runs; running it twice must do no harm."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _undone(undo)


@with_block
def _undone(undo: Callable[[], object], *, block: Block) -> Iterator[None]:
    mine = _Undo(block)
    mine.undo = undo
    try:
        _OPEN[id(mine)] = mine
        yield
    finally:
        mine.run()


class _Undo:
    """What remains to be done when a block is over."""

    undo: Callable[[], object]

    def __init__(self, block: Block):
        self.block = block

    def run(self, late: bool = False) -> None:
        """Do it, and forget it; `late` after an exit that was interrupted."""
        if id(self) in _OPEN:
            self.undo()
            _OPEN.pop(id(self), None)


class _Change(_Undo):
    """One place, what it held before, and what it holds while a block is open."""

    def __init__(self, block: Block, target: Any, name: Any, value: Any):
        super().__init__(block)
        self.target, self.name, self.value = target, name, value
        self.before = ABSENT
        self.call = current()

    def make(self) -> None:
        """Change the place, unless another call has it."""
        with _LOCK:
            changes = _PLACES.setdefault((id(self.target), self.name), [])
            for other in reversed(list(changes)):
                if other.block.over:
                    other.run(late=True)
                elif other.call is not self.call:
                    _refuse(f"a part of a model ({type(self.target).__name__}, {self.name!r})")
            self.before = _read(self.target, self.name)
            _OPEN[id(self)] = self
            _PLACES.setdefault((id(self.target), self.name), []).append(self)
            _write(self.target, self.name, self.value)

    def run(self, late: bool = False) -> None:
        """Put back what was there; late only if nobody has changed it since."""
        with _LOCK:
            changes = _PLACES.get((id(self.target), self.name), [])
            if self in changes:
                i = changes.index(self)
                now = _read(self.target, self.name)
                if i + 1 < len(changes):
                    # Blocks of several threads may end in any order.
                    changes[i + 1].before = self.before
                elif now is not self.before and (not late or now is self.value):
                    _write(self.target, self.name, self.before)
                changes.remove(self)
                if not changes:
                    _PLACES.pop((id(self.target), self.name), None)
            _OPEN.pop(id(self), None)


def _read(target: Any, name: Any) -> Any:
    if isinstance(target, dict):
        return target.get(name, ABSENT)
    if isinstance(target, nn.Module):
        # What the class or a parent gives is no attribute of its own.
        return target.__dict__.get(name, ABSENT)
    return getattr(target, name)


def _write(target: Any, name: Any, value: Any) -> None:
    if isinstance(target, dict):
        if value is ABSENT:
            target.pop(name, None)
        else:
            target[name] = value
    elif value is not ABSENT:
        setattr(target, name, value)
    elif name in target.__dict__:
        delattr(target, name)
