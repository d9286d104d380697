"""The mean of a meta loss over many episodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.known import with_gradient
from metafocus.calls import note
from metafocus.checks import check_finite, function, whole
from metafocus.engine import META_LOSS, MetaLoss
from metafocus.engine.outer_call import outermost
from metafocus.errors import ProblemError, TransformError
from metafocus.parallel.collectives import Group
from metafocus.problem import check_params
from metafocus.streams import Shared, is_stream
from metafocus.tasks.chunks import Chunks, size_of
from metafocus.tasks.group_mean import over_ranks
from metafocus.torch_internals import transforming
from metafocus.types import Aux, Params

_VMAP_CANNOT = (
    "Batching rule not implemented",
    ".item() on a Tensor",
    "data-dependent control flow",
)
"""What torch says of a loss that `vmap` cannot run."""


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
            all tasks, the same on every rank, so nothing is left to reduce, whichever entries of
            `outer` a rank's tasks need. `Aux` is of the rank's own tasks, and so is a gradient by
            `episodes`. All ranks must ask for a gradient by `outer` together. None: this rank has
            all tasks.

    Returns:
        `(outer, episodes) -> (mean loss, Aux)`, the tensors of `Aux` stacked on axis 0. Of an
        episode's streams, `mf.PerStep` is stacked by task; others must be `mf.shared`.

    Raises:
        ValueError: for a setting that is none of those above.
        ProblemError: if the episodes' tensors disagree about the number of tasks; for a stream
            that is neither stacked nor shared; if tasks return different metrics; on every rank
            of a group if one has no tasks, for sharded weights, which have a mean of their own,
            and for a tensor that requires grad and is in no argument.
        TransformError: if a loss draws random numbers and `randomness` is "error", or does what
            torch's vmap cannot.
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
    function("meta_loss", meta_loss, META_LOSS, 2)
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
        check_params(outer, "outer", "outer parameters")
        return outermost(over_ranks(self._mean, self.group), outer, episodes)

    def _mean(self, outer: Params, episodes: Any) -> tuple[Tensor, Aux]:
        tensors, rebuild = pt.partition(episodes)
        _refuse_whole([x for x in pt.leaves(episodes) if not isinstance(x, Tensor)])
        count = _task_count(tensors)
        size = size_of(self.chunk_size, count, self)
        chunks = f"{math.ceil(count / size)} chunks of at most {size}"
        note("tasks", f"{count} in {chunks}, how={self.how!r}, randomness={self.randomness!r}")
        if size >= count and self.how == "vmap":
            loss, aux = self.several(outer, tensors, rebuild)
            return loss, self._checked(aux)
        chunks = Chunks(self, tensors, rebuild, size, count)
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

    def several(
        self, outer: Params, tensors: list[Tensor], rebuild: Callable[[Any], Any]
    ) -> tuple[Tensor, Aux]:
        # Flat, and without what is not batched: vmap walks its arguments several times.
        several = torch.func.vmap(
            lambda *xs: self.one(outer, rebuild(xs)), randomness=self.randomness
        )
        try:
            losses, aux = several(*tensors)
        except RuntimeError as error:
            # Only the text tells these errors from others; if torch changes it, it is shown as is.
            if self.randomness == "error" and "called random operation" in str(error):
                raise TransformError(
                    "a loss draws random numbers, as dropout does, and over_tasks must know "
                    'whether tasks share them. Pass randomness="different" for numbers of its own '
                    'for each task, or randomness="same".'
                ) from error
            if any(words in str(error) for words in _VMAP_CANNOT):
                raise TransformError(
                    "a loss does what torch cannot do for several tasks at once (nn.LSTM, .item() "
                    f'and branches on values are such): {error} Pass how="loop".'
                ) from error
            raise
        return losses.mean(), aux

    def one(self, outer: Params, episode: Any) -> tuple[Tensor, Aux]:
        loss, aux = self.meta_loss(outer, episode)
        if self.aux == "losses" and isinstance(aux, Aux):
            aux = aux._replace(params={})
        return loss, aux

    def _checked(self, aux: Any) -> Any:
        if isinstance(aux, Aux) and not transforming():
            check_finite(aux.inner_losses)
        return aux


def _refuse_whole(parts: list[Any]) -> None:
    """Raise for streams and containers that are not taken apart: tasks would see those of all."""
    for stream in filter(is_stream, parts):
        if not isinstance(stream, Shared):
            raise ProblemError(
                f"a stream of type {type(stream).__name__} cannot be stacked over tasks. Wrap it "
                "as mf.shared(stream) if all tasks share it, or stack mf.PerStep of each task."
            )
    for name in pt.sealed([x for x in parts if not is_stream(x)]):
        raise ProblemError(
            f"the episodes hold a {name}, which torch does not know as a container: every task "
            "would see its tensors whole. Pass a dict, list, tuple or NamedTuple of them "
            "(`dict(batch)`, `vars(batch)`)."
        )


def _task_count(tensors: list[Tensor]) -> int:
    sizes = [x.shape[0] if x.ndim else None for x in tensors]
    if not sizes or None in sizes or len(set(sizes)) != 1 or sizes[0] == 0:
        raise ProblemError(
            "episodes must be stacked on axis 0, with one entry for each task in every tensor; "
            f"got axis-0 sizes {sizes}. Stack single episodes with mf.stack_episodes(episodes)."
        )
    return int(sizes[0])  # pyright: ignore[reportArgumentType]
