"""Many episodes at once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.grad import leaf_alias, reaches_another_leaf
from metafocus.autodiff.known import with_gradient
from metafocus.calls import note
from metafocus.checks import check_finite, function, whole
from metafocus.engine import META_LOSS, MetaLoss
from metafocus.engine.outer_call import outermost
from metafocus.errors import NonFiniteError, ProblemError, TransformError
from metafocus.parallel.collectives import Group, replicated, share_of_tasks, summed
from metafocus.problem import is_frozen
from metafocus.rng import Drawn
from metafocus.sharding import refuse_sharded_outer
from metafocus.streams import Shared, is_stream
from metafocus.torch_internals import pytree, transforming
from metafocus.types import Aux, Params

CHUNK = 200
"""With `chunk_size="auto"`: from here on more tasks at once cost memory and save no time."""


def over_tasks(
    meta_loss: MetaLoss,
    *,
    how: str = "vmap",
    chunk_size: int | str | None = "auto",
    aux: str = "all",
    randomness: str = "error",
    group: Group = None,
) -> MetaLoss:
    """Return the mean of `meta_loss` over episodes stacked on axis 0.

    Where the tasks run in several chunks, each chunk is differentiated by `outer` in the forward
    pass, before the next one begins: under `backward`, `hypergrad` and inside any function of
    your own the memory is that of one chunk. Higher derivatives run the chunks again. Inside
    transforms, and where something besides `outer` needs a gradient, the graph of all tasks is
    kept.

    Args:
        meta_loss: the loss of one episode.
        how: "vmap" runs a chunk of tasks at once: several times faster on small networks. "loop"
            runs one after the other, each a chunk of its own: faster for convolutions on a CPU.
        chunk_size: how many tasks `vmap` runs at once; None: all; "auto": all up to 200, then
            chunks of at most 200. One chunk under `randomness="different"` and "auto".
        aux: "all" returns the adapted fast weights of every task in `Aux.params`; "losses" keeps
            none of them.
        randomness: what random operations do under `vmap`: "error", "same" or "different". With
            "same", chunks and the tasks of a loop draw the same numbers too.
        group: ranks that share the tasks, such as `torch.distributed.group.WORLD`. Each is given
            tasks of its own, as many as it likes; loss and gradient are those of the mean over
            all tasks, the same on every rank, so nothing is left to reduce. `Aux` is of the rank's
            own tasks. None: this rank has all tasks.

    Returns:
        `(outer, episodes) -> (mean loss, Aux)`, the tensors of `Aux` stacked on axis 0. Of an
        episode's streams, `mf.PerStep` is stacked by task; others must be `mf.shared`.

    Raises:
        ValueError: for a setting that is none of those above.
        ProblemError: if the episodes' tensors disagree about the number of tasks; for a stream
            that is neither stacked nor shared; if tasks return different metrics; on every rank
            of a group if one has no tasks, and for sharded weights, which have a mean of their own.
        TransformError: if a loss draws random numbers and `randomness` is "error".
        NonFiniteError: outside transforms, naming the task.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> maml = mf.Problem(loss, loss)
        >>> meta = mf.bilevel(maml, solver=mf.SGD(0.1, steps=1), estimator=mf.Unrolled())
        >>> data = torch.tensor([[0.0], [2.0]])
        >>> w = {"w": torch.tensor([1.0], requires_grad=True)}
        >>> value, aux = mf.over_tasks(meta)(w, mf.Episode(data, data))
        >>> aux.params["w"].shape
        torch.Size([2, 1])
    """
    function("meta_loss", meta_loss, META_LOSS)
    for name, value, allowed in (
        ("how", how, ("vmap", "loop")),
        ("aux", aux, ("all", "losses")),
        ("randomness", randomness, ("error", "same", "different")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}.")
    if chunk_size not in ("auto", None):
        whole("chunk_size", chunk_size, 1, note=', "auto" or None')
    return _OverTasks(meta_loss, how, chunk_size, aux, randomness, group)


@dataclass(frozen=True)
class _OverTasks:
    """The mean of a meta loss over tasks, chunk by chunk."""

    meta_loss: MetaLoss
    how: str
    chunk_size: int | str | None
    aux: str
    randomness: str
    group: Group = None

    def __call__(self, outer: Params, episodes: Any) -> tuple[Tensor, Aux]:
        return outermost(self._mean if self.group is None else self._share, outer, episodes)

    def _share(self, outer: Params, episodes: Any) -> tuple[Tensor, Aux]:
        """Return the mean over the tasks of all ranks, from this rank's mean and its share."""
        refuse_sharded_outer(outer)
        tensors, _ = pt.partition(episodes)
        share = share_of_tasks(len(tensors[0]) if tensors and tensors[0].ndim else 0, self.group)
        # A frozen parameter is known by its type.
        entering = {k: v if is_frozen(v) else replicated(v, self.group) for k, v in outer.items()}
        loss, aux = self._mean(entering, episodes)
        return summed(share * loss, self.group), aux

    def _mean(self, outer: Params, episodes: Any) -> tuple[Tensor, Aux]:
        _refuse_unshared(episodes)
        tensors, rebuild = pt.partition(episodes)
        count = _task_count(tensors)
        size = self._size(count)
        chunks = f"{math.ceil(count / size)} chunks of at most {size}"
        note("tasks", f"{count} in {chunks}, how={self.how!r}, randomness={self.randomness!r}")
        if size >= count and self.how == "vmap":
            loss, aux = self._several(outer, tensors, rebuild)
            return loss, self._checked(aux)
        chunks = _Chunks(self, tensors, rebuild, size, count)
        moving = tuple(k for k, v in outer.items() if v.requires_grad)
        separate = moving and torch.is_grad_enabled() and not transforming()
        if separate and not any(x.requires_grad for x in tensors):
            found = chunks.differentiated(outer, moving)
            if found is not None:
                aux = self._checked(chunks.joined())

                def again(*xs: Tensor) -> Tensor:
                    with chunks.drawn.again():
                        return chunks.mean({**outer, **dict(zip(moving, xs, strict=True))})

                return with_gradient(*found, [outer[k] for k in moving], again), aux
        loss = chunks.mean(outer)
        return loss, self._checked(chunks.joined())

    def _size(self, count: int) -> int:
        if self.how == "loop":
            return 1
        if self.chunk_size is None or (
            self.chunk_size == "auto" and self.randomness == "different"
        ):
            return count
        if self.chunk_size == "auto":
            # Chunks of equal size, as nearly as possible.
            return math.ceil(count / math.ceil(count / CHUNK))
        return int(self.chunk_size)

    def _several(
        self, outer: Params, tensors: list[Tensor], rebuild: Callable[[Any], Any]
    ) -> tuple[Tensor, Aux]:
        # Flat, and without what is not batched: vmap walks its arguments several times.
        several = torch.func.vmap(
            lambda *xs: self._one(outer, rebuild(xs)), randomness=self.randomness
        )
        try:
            losses, aux = several(*tensors)
        except RuntimeError as error:
            # Only the text tells this error from others; if torch changes it, it is shown as it is.
            if self.randomness != "error" or "called random operation" not in str(error):
                raise
            raise TransformError(
                "a loss draws random numbers, as dropout does, and over_tasks must know whether "
                'tasks share them. Pass randomness="different" for numbers of its own for each '
                'task, or randomness="same".'
            ) from error
        return losses.mean(), aux

    def _one(self, outer: Params, episode: Any) -> tuple[Tensor, Aux]:
        loss, aux = self.meta_loss(outer, episode)
        if self.aux == "losses" and isinstance(aux, Aux):
            aux = aux._replace(params={})
        return loss, aux

    def _checked(self, aux: Any) -> Any:
        if isinstance(aux, Aux) and not transforming():
            check_finite(aux.inner_losses)
        return aux


class _Chunks:
    """The chunks of one call: their losses, one after another, and their auxiliary outputs."""

    def __init__(
        self,
        tasks: _OverTasks,
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
        self.drawn = Drawn(tensors)
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
            return self.tasks._several(outer, part, self.rebuild)
        try:
            loss, aux = self.tasks._one(outer, self.rebuild([x[0] for x in part]))
        except NonFiniteError as error:
            raise NonFiniteError(f"Task {first}: {error}") from error
        return loss, pytree.tree_map(lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x, aux)

    def _store(self, aux: Any, first: int) -> None:
        metrics = aux.metrics if isinstance(aux, Aux) else {}
        if first == 0:
            self.spec = pytree.tree_structure(aux)
            self.leaves = [self._room(x) for x in pytree.tree_leaves(aux)]
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


def _refuse_unshared(episodes: Any) -> None:
    for leaf in pytree.tree_leaves(episodes):
        if is_stream(leaf) and not isinstance(leaf, Shared):
            raise ProblemError(
                f"a stream of type {type(leaf).__name__} cannot be stacked over tasks. Wrap it as "
                "mf.shared(stream) if all tasks share it, or stack mf.PerStep of each task."
            )


def _task_count(tensors: list[Tensor]) -> int:
    sizes = [x.shape[0] if x.ndim else None for x in tensors]
    if not sizes or None in sizes or len(set(sizes)) != 1 or sizes[0] == 0:
        raise ProblemError(
            "episodes must be stacked on axis 0, with one entry for each task in every tensor; "
            f"got axis-0 sizes {sizes}. Stack single episodes with mf.stack_episodes(episodes)."
        )
    return int(sizes[0])  # pyright: ignore[reportArgumentType]
