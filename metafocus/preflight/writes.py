"""State outside the fast weights: buffers that a forward pass changes, and updates in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.calls import undone
from metafocus.closures import closures_of
from metafocus.errors import ProblemError
from metafocus.torch_internals import (
    TorchDispatchMode,
    is_wrapper,
    operator_arguments,
    parts_of,
    pytree,
    storage_key,
)


@dataclass
class Moved:
    """What a function has changed without writing to memory that was there before.

    Attributes:
        tensors: names of tensors that were replaced by others that depend on the fast weights.
        numbers: names of numbers, and of containers that grew.
    """

    tensors: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)


@contextlib.contextmanager
def refused_writes(who: str, given: list[tuple[str, Tensor]], owner: Any) -> Iterator[Moved]:
    """Raise after a `with` block if something outside it was written to, and undo the writes.

    Yields what else has changed, filled in after the block: only another evaluation can tell
    whether it is a state.

    Args:
        who: what runs inside, for the message.
        given: the tensors that it is given, each with what it is.
        owner: the function that runs: what it closes over is named in the message.
    """
    moved, reads = Moved(), closures_of(owner)
    with Writes() as writes, undone(partial(_undo, writes)):
        yield moved
    now = closures_of(owner)
    before, after = _tensors(reads), _tensors(now)
    replaced = [k for k, x in before.items() if _replaced(k, x, after)]
    # What depends on the fast weights was computed from them, as by the hooks of weight_norm.
    moved.tensors += [k for k in replaced if k in after and after[k].requires_grad]
    moved.numbers += [k for k, x in now.items() if _is_number(x) and reads.get(k) != x]
    changed = [k for k in replaced if k not in moved.tensors]
    if not writes.saved and not changed:
        return
    written = {key for x, _ in writes.saved for key in _memory(x)}
    names = [k for k, x in given if written & _memory(x)]
    hidden = [k for k, x in before.items() if written & _memory(x)]
    if names:
        raise ProblemError(
            f"{who} changes {names[0]} in place. Losses and solvers are pure functions here: "
            "return new tensors (`p - lr * g`, not `p.sub_(lr * g)`), or clone first."
        )
    raise hidden_state(who, (hidden or changed or ["a tensor that it closes over"])[0])


def hidden_state(who: str, what: str) -> ProblemError:
    """Return the error for a state that changes at every call."""
    return ProblemError(
        f"{who} changes {what} at every call: hidden state, which moves while a hypergradient is "
        "computed and makes estimators disagree. Call eval() on that module (spectral norm keeps "
        "its power iteration still there), or pass the state through the fast weights."
    )


def _undo(writes: Writes) -> None:
    with torch.no_grad():
        for x, value in reversed(writes.saved):
            x.copy_(value)


def _memory(x: Any) -> set[int]:
    """Return what identifies the memory of a tensor; of anything else, nothing."""
    parts = parts_of(x) if isinstance(x, Tensor) else ()
    return {storage_key(part.untyped_storage()) for part in parts}


def _replaced(name: str, x: Tensor, after: dict[str, Tensor]) -> bool:
    """Return whether another tensor has its name, or none has it and the tensor is gone too."""
    if name in after:
        return x is not after[name] and not _gathered(x, after[name])
    # A hook may have made it known by another name.
    return all(x is not y for y in after.values())


def _gathered(x: Tensor, y: Tensor) -> bool:
    """Return whether FSDP has put a gathered parameter in the place of a sharded one, or back."""
    both = isinstance(x, nn.Parameter) and isinstance(y, nn.Parameter) and x.shape == y.shape
    return both and (is_wrapper(x) or is_wrapper(y))


def _tensors(reads: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among what a function closes over, by name."""
    return {k: v[0].value for k, v in reads.items() if _is_tensor(v)}


def _is_number(entry: Any) -> bool:
    """Return whether something that a function reads is a number or a length."""
    return isinstance(entry, int) or (isinstance(entry, tuple) and entry[0] in (int, float, bool))


def _is_tensor(entry: Any) -> bool:
    found = entry[0] if isinstance(entry, tuple) and entry else None
    return isinstance(getattr(found, "value", None), Tensor)


class Writes(TorchDispatchMode):
    """Records what is written to inside a block and was not made there.

    Attributes:
        saved: each tensor that was written to, and a copy of what it held before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[tuple[Tensor, Tensor]] = []
        self._made: set[int] = set()
        self._seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # FSDP2's hooks gather weights anew and free their memory, so they are not state.
        gathers = getattr(func, "namespace", "") == "fsdp"
        for argument, value in () if gathers else _bound(func, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in pytree.tree_leaves(value):
                    self._note(x)
        out = func(*args, **kwargs)
        self._made |= _all_memory(out) - _all_memory((args, kwargs))
        return out

    def _note(self, x: Any) -> None:
        if _memory(x) <= self._made:
            return
        # Two parts of one tensor may be written to one after the other: both are put back.
        places = tuple(
            (storage_key(part.untyped_storage()), part.storage_offset(), part.shape, part.stride())
            for part in parts_of(x)
        )
        if places not in self._seen:
            self._seen.add(places)
            self.saved.append((x, x.clone()))


def _all_memory(tree: Any) -> set[int]:
    return {key for x in pytree.tree_leaves(tree) for key in _memory(x)}


def _bound(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for i, argument in enumerate(operator_arguments(func)):
        if i < len(args):
            yield argument, args[i]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]
