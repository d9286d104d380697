"""Changes that last as long as a block: of attributes, entries of dicts, and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.calls.blocks import Block, settle, undone, with_block
from metafocus.calls.owners import inside, own
from metafocus.torch_internals import swapped_weights, weight_tables

ABSENT: Any = object()
"""The value of an attribute or a key that does not exist."""

Place = tuple[Any, Any, Any]


def changed(*places: Place) -> contextlib.AbstractContextManager[None]:
    """Return a block in which each `(target, name, value)` holds; the current call owns the target.

    Args:
        places: an object and the name of an attribute, or a dict and a key, each with the value
            in the block; `ABSENT` removes it there.

    Raises:
        ProblemError: if another call has changed one of the targets.

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
def _traced(places: tuple[Place, ...]) -> Iterator[None]:
    before = [(target, name, _read(target, name)) for target, name, _ in places]
    try:
        for place in places:
            _write(*place)
        yield
    finally:
        for place in reversed(before):
            _write(*place)


@with_block
def _changed(places: tuple[Place, ...], *, block: Block) -> Iterator[None]:
    before: list[tuple[Place, Any]] = []

    def put_back() -> None:
        for (target, name, value), own_value in reversed(before):
            # When it is late, a user may have changed the place since.
            if not block.over or _read(target, name) is value:
                _write(target, name, own_value)

    with inside():
        # What an interrupted exit has left is not what was there before.
        settle()
        with undone(put_back):
            for target, name, value in places:
                own(target, f"a part of a model ({type(target).__name__}, {name!r})")
                before.append(((target, name, value), _read(target, name)))
                _write(target, name, value)
            yield


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
    given = {id(tensor) for tensor in tensors.values()}
    tables = [(t, dict(t)) for m in module.modules() for t in weight_tables(m)]

    def put_back() -> None:
        # Torch does this too, except after an interrupt inside its exit.
        for table, before in tables:
            table.update({k: x for k, x in before.items() if id(table.get(k)) in given})

    with undone(put_back), swap:
        yield


def _read(target: Any, name: Any) -> Any:
    if isinstance(target, dict):
        return target.get(name, ABSENT)
    if isinstance(target, nn.Module):
        # An attribute of the class or of a parent is not the object's own.
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
