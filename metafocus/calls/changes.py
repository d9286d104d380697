"""Changes that last as long as a block: of attributes, entries of dicts, and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.calls.blocks import Block, with_block
from metafocus.calls.owners import current, inside, refuse, using
from metafocus.calls.undo import LOCK, settle, undone
from metafocus.errors import ProblemError
from metafocus.torch_internals import swapped_weights, weight_tables

ABSENT: Any = object()
"""The value of an attribute or a key that does not exist."""

_PLACES: dict[tuple[int, Any], list[_Change]] = {}
_RUNNING: dict[int, bool] = {}


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
    changes: list[_Change] = []

    def put_back() -> None:
        for change in reversed(changes):
            change.end()

    with inside(), undone(put_back):
        for place in places:
            change = _Change(block, *place)
            changes.append(change)
            change.begin()
        yield


def evaluating(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a block in which a model is in evaluation mode, every module of it."""
    return changed(*((module, "training", False) for module in model.modules()))


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
    tables = [(t, dict(t)) for m in module.modules() for t in weight_tables(m)]
    failed = True

    def put_back() -> None:
        if failed:
            _put_back(module, tensors, tables)

    with undone(put_back):
        with swap:
            yield
        failed = False


def _put_back(module: nn.Module, names: Mapping[str, Tensor], tables: list[Any]) -> None:
    before = {id(table): values for table, values in tables}
    named = [
        (f"{path}.{name}" if path else name, value)
        for path, m in module.named_modules()
        for table in weight_tables(m)
        for name, value in before.get(id(table), {}).items()
    ]
    # Tied weights have several names.
    own = {id(value) for name, value in named if name in names}
    for table, values in tables:
        table.update({name: value for name, value in values.items() if id(value) in own})


class _Change:
    """One place, what it held before, and what it holds while a block is open."""

    def __init__(self, block: Block, target: Any, name: Any, value: Any):
        self.block = block
        self.call = current()
        self.target, self.name, self.value = target, name, value
        self.before = ABSENT
        self.key = id(target), name

    def begin(self) -> None:
        """Change the place, unless another call has it."""
        with LOCK:
            for other in reversed(_PLACES.get(self.key, [])):
                if other.block.over:
                    other.end()
                elif other.call is not self.call:
                    refuse(f"a part of a model ({type(self.target).__name__}, {self.name!r})")
            self.before = _read(self.target, self.name)
            _PLACES.setdefault(self.key, []).append(self)
            _write(self.target, self.name, self.value)

    def end(self) -> None:
        """Put back what was there; late only if nobody has changed it since."""
        with LOCK:
            changes = _PLACES.get(self.key, [])
            if self not in changes:
                return
            now, i = _read(self.target, self.name), changes.index(self)
            if i + 1 < len(changes):
                # Blocks of several threads may end in any order.
                changes[i + 1].before = self.before
            elif now is not self.before and (not self.block.over or now is self.value):
                _write(self.target, self.name, self.before)
            changes.remove(self)
            if not changes:
                del _PLACES[self.key]


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
