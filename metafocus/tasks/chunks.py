"""Tasks chunk by chunk: how many at once, and the gradient of each chunk before the next begins."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from metafocus.autodiff.grad import leaf_alias, reaches_another_leaf
from metafocus.errors import NonFiniteError, ProblemError
from metafocus.rng import Drawn
from metafocus.torch_internals import pytree, transforming
from metafocus.types import Aux, Params

CHUNK = 200
"""With `chunk_size="auto"`: from here on more tasks at once cost memory and save no time."""


class Tasks(Protocol):
    """What runs the tasks of a chunk."""

    @property
    def how(self) -> str:
        """Return "vmap" or "loop"."""
        ...

    @property
    def randomness(self) -> str:
        """Return what random operations do."""
        ...

    def one(self, outer: Params, episode: Any) -> tuple[Tensor, Any]:
        """Return the loss of one task."""
        ...

    def several(
        self, outer: Params, tensors: list[Tensor], rebuild: Callable[[Any], Any]
    ) -> tuple[Tensor, Any]:
        """Return the mean loss of several tasks, which run at once."""
        ...


def size_of(chunk_size: int | str | None, count: int, tasks: Tasks) -> int:
    """Return how many of `count` tasks run at once."""
    if tasks.how == "loop":
        return 1
    if chunk_size is None or (chunk_size == "auto" and tasks.randomness == "different"):
        return count
    if chunk_size == "auto":
        # Chunks of equal size, as nearly as possible.
        return math.ceil(count / math.ceil(count / CHUNK))
    return int(chunk_size)


class Chunks:
    """The chunks of one call: their losses, one after another, and their auxiliary outputs."""

    def __init__(
        self,
        tasks: Tasks,
        tensors: list[Tensor],
        rebuild: Callable[[Any], Any],
        size: int,
        count: int,
    ):
        self.tasks = tasks
        self.tensors = tensors
        self.rebuild = rebuild
        self.size = size
        self.count = count
        self.drawn: Drawn = Drawn(tensors)
        self.leaves: list[Any] = []
        self.spec: Any = None
        self.names: list[str] = []

    def values(self, outer: Params) -> Iterator[tuple[float, Tensor]]:
        """Yield the share and the mean loss of each chunk; keep its auxiliary output."""
        for first in range(0, self.count, self.size):
            part = [x[first : first + self.size] for x in self.tensors]
            repeat = first and self.tasks.randomness == "same"
            with self.drawn.again() if repeat else contextlib.nullcontext():
                loss, aux = self._run(outer, part, first)
            self._store(aux, first)
            yield len(part[0]) / self.count, loss

    def mean(self, outer: Params) -> Tensor:
        """Return the mean loss, with the graph of all chunks."""
        return torch.stack([share * loss for share, loss in self.values(outer)]).sum()

    def _run(self, outer: Params, part: list[Tensor], first: int) -> tuple[Tensor, Any]:
        if self.tasks.how == "vmap":
            return self.tasks.several(outer, part, self.rebuild)
        try:
            return self.tasks.one(outer, self.rebuild([x[0] for x in part]))
        except NonFiniteError as error:
            raise NonFiniteError(f"Task {first}: {error}") from error

    def _store(self, aux: Any, first: int) -> None:
        metrics = aux.metrics if isinstance(aux, Aux) else {}
        if first == 0:
            self.names = list(metrics)
        odd = sorted(set(metrics) ^ set(self.names))
        if odd:
            raise ProblemError(
                f"task {first} and task 0 returned different metrics: {odd[0]!r} is on one side "
                "only. Return the same names for every task."
            )
        if metrics:
            aux = aux._replace(metrics={k: metrics[k] for k in self.names})
        leaves, spec = pytree.tree_flatten(aux)
        if self.tasks.how == "loop":
            leaves = [x.unsqueeze(0) if isinstance(x, Tensor) else x for x in leaves]
        if first == 0:
            self.spec, self.leaves = spec, [self._room(x) for x in leaves]
        if spec != self.spec:
            raise ProblemError(
                f"task {first} returned other fast weights than task 0: {spec} and {self.spec}. "
                "Return the same names for every task."
            )
        for i, x in enumerate(leaves):
            room = self.leaves[i]
            if isinstance(room, list):
                room.append(x)
                continue
            if x.shape[1:] != room.shape[1:]:
                raise ProblemError(
                    f"task {first} returned a metric or fast weight of shape "
                    f"{list(x.shape[1:])}, task 0 one of {list(room.shape[1:])}. Return the same "
                    "shapes for every task."
                )
            if x.dtype != room.dtype:
                # A metric may be 0 for one task and 0.5 for the next.
                room = self.leaves[i] = room.to(torch.promote_types(room.dtype, x.dtype))
            room[first : first + self.size] = x.detach()

    def _room(self, x: Any) -> Any:
        # One tensor for all tasks, written to chunk by chunk; transforms do not allow that.
        if isinstance(x, Tensor) and not transforming():
            return x.new_empty((self.count, *x.shape[1:]))
        return []

    def joined(self) -> Any:
        """Return the auxiliary outputs of all chunks, stacked on axis 0."""
        found = [
            (torch.cat(room) if isinstance(room[0], Tensor) else room[0])
            if isinstance(room, list)
            else room
            for room in self.leaves
        ]
        return pytree.tree_unflatten(found, self.spec)

    def differentiated(
        self, outer: Params, moving: tuple[str, ...]
    ) -> tuple[Tensor, list[Tensor | None]] | None:
        """Return the mean loss and its gradient by the moving parameters, chunk by chunk.

        None if a chunk depends on any other leaf, which would miss its gradient.
        """
        leaves = {k: leaf_alias(v, False) if k in moving else v for k, v in outer.items()}
        at = [leaves[k] for k in moving]
        grads: list[Tensor | None] = [None] * len(at)
        losses = []
        for share, loss in self.values(leaves):
            if reaches_another_leaf(loss, at):
                return None
            losses.append(share * loss.detach())
            if loss.requires_grad:
                found = torch.autograd.grad(share * loss, at, allow_unused=True)
                grads = [_sum(a, b) for a, b in zip(grads, found, strict=True)]
        return torch.stack(losses).sum(), grads


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
