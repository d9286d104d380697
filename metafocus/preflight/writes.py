"""State outside the fast weights: buffers that a forward pass changes, and updates in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metafocus.calls import undone
from metafocus.closures import closures_of
from metafocus.errors import ProblemError
from metafocus.torch_internals import TorchDispatchMode, operator_arguments, pytree, storage_key


@contextlib.contextmanager
def refused_writes(who: str, given: list[tuple[str, Tensor]], owner: Any) -> Iterator[None]:
    """Raise after a `with` block if something outside it was written to, and undo the writes.

    Args:
        who: what runs inside, for the message.
        given: the tensors that it is given, each with what it is.
        owner: the function that runs: what it closes over is named in the message.

    Raises:
        ProblemError: naming what was written to.
    """
    before = _held(owner)
    with Writes() as writes, undone(partial(_undo, writes)):
        yield
    after = _held(owner)
    # FSDP puts a gathered tensor in the place of a sharded one.
    changed = [
        k
        for k, x in before.items()
        if x is not (y := after.get(k)) and _has_storage(x) and (y is None or _has_storage(y))
    ]
    if not writes.saved and not changed:
        return
    storages = {_memory(x) for x, _ in writes.saved}
    names = [k for k, x in given if _memory(x) in storages]
    hidden = [k for k, x in before.items() if _memory(x) in storages]
    if names:
        raise ProblemError(
            f"{who} changes {names[0]} in place. Losses and solvers are pure functions here: "
            "return new tensors (`p - lr * g`, not `p.sub_(lr * g)`), or clone first."
        )
    what = (hidden or changed or ["a tensor that it closes over"])[0]
    raise ProblemError(
        f"{who} changes {what} at every call: hidden state, which moves while a hypergradient is "
        "computed and makes estimators disagree. Call eval() on that module (spectral norm keeps "
        "its power iteration still there), or pass the state through the fast weights."
    )


def _undo(writes: Writes) -> None:
    with torch.no_grad():
        for x, value in reversed(writes.saved):
            x.copy_(value)


def _memory(x: Tensor) -> int:
    return storage_key(x.untyped_storage())


def _held(owner: Any) -> dict[str, Tensor]:
    """Return the tensors that a function closes over, by name."""
    found = closures_of(owner).items()
    return {k: v[0].value for k, v in found if isinstance(v, tuple) and v and _is_tensor(v[0])}


def _is_tensor(entry: Any) -> bool:
    return isinstance(getattr(entry, "value", None), Tensor)


class Writes(TorchDispatchMode):
    """Records what is written to inside a block and was not made there.

    Attributes:
        saved: each tensor that was written to, and a copy of what it held before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[tuple[Tensor, Tensor]] = []
        self._made: set[int] = set()
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in _bound(func, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in pytree.tree_leaves(value):
                    self._note(x)
        out = func(*args, **kwargs)
        self._made |= _storages(out) - _storages((args, kwargs))
        return out

    def _note(self, x: Any) -> None:
        if _has_storage(x):
            key = storage_key(x.untyped_storage())
            if key not in self._made and key not in self._seen:
                self._seen.add(key)
                self.saved.append((x, x.clone()))


def _storages(tree: Any) -> set[int]:
    found = (x for x in pytree.tree_leaves(tree) if _has_storage(x))
    return {storage_key(x.untyped_storage()) for x in found}


def _has_storage(x: Any) -> bool:
    # Wrappers such as DTensor have none of their own.
    return type(x) in (Tensor, torch.nn.Parameter)


def _bound(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for i, argument in enumerate(operator_arguments(func)):
        if i < len(args):
            yield argument, args[i]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]
