"""Many episodes at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metafocus import tree
from metafocus.bilevel import MetaLoss, sum_of
from metafocus.errors import NonFiniteError, ProblemError
from metafocus.levels import transforming
from metafocus.problem import check_finite
from metafocus.types import Aux, Params


def over_tasks(
    meta_loss: MetaLoss,
    *,
    how: str = "vmap",
    chunk_size: int | None = None,
    randomness: str = "error",
) -> MetaLoss:
    """Return the mean of `meta_loss` over episodes stacked on axis 0.

    Args:
        meta_loss: the loss of one episode.
        how: "vmap" runs all tasks at once: several times faster on small networks. "loop" runs
            one after the other: faster for convolutions on a CPU. Under `hypergrad` outside
            transforms each task is differentiated before the next begins: the memory of one.
        chunk_size: how many tasks `vmap` runs at once; None: all. Under `hypergrad` the memory
            of one chunk.
        randomness: what random operations do under `vmap`: "error", "same" or "different".

    Returns:
        `(outer, episodes) -> (mean loss, Aux)`, the tensors of `Aux` stacked on axis 0.

    Raises:
        ProblemError: if the episodes' tensors disagree about the number of tasks.
        NonFiniteError: outside transforms, naming the task.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> maml = mf.Problem(loss, loss, init=lambda slow: slow)
        >>> meta = mf.bilevel(maml, solver=mf.SGD(0.1, steps=1), estimator=mf.Unrolled())
        >>> data = torch.tensor([[0.0], [2.0]])
        >>> value, aux = mf.over_tasks(meta)({"w": torch.tensor([1.0])}, mf.Episode(data, data))
        >>> aux.params["w"].shape
        torch.Size([2, 1])
    """
    if how not in ("vmap", "loop"):
        raise ValueError(f'how must be "vmap" or "loop", got {how!r}.')
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1 or None, got {chunk_size}.")
    return _OverTasks(meta_loss, how, chunk_size, randomness)


@dataclass(frozen=True)
class _OverTasks:
    """The mean of a meta loss over tasks, which can also be had piece by piece."""

    meta_loss: MetaLoss
    how: str
    chunk_size: int | None
    randomness: str

    def __call__(self, outer: Params, episodes: Any) -> tuple[Tensor, Aux]:
        results = [piece(outer) for piece in self.pieces(episodes)]
        return sum_of([loss for loss, _ in results]), self.join([aux for _, aux in results])

    def pieces(self, episodes: Any) -> list[Callable[[Params], tuple[Tensor, Aux]]]:
        """Return functions of the outer parameters whose losses add up to the mean."""
        tensors, rebuild = tree.partition(episodes)
        count = _task_count(tensors)
        if self.how == "loop":
            return [
                functools.partial(self._one, rebuild([x[i] for x in tensors]), i, count)
                for i in range(count)
            ]
        # Random numbers that are the same for all tasks are drawn once.
        whole = self.chunk_size is None or self.chunk_size >= count or self.randomness == "same"

        def several(chunk: list[Tensor], share: float, outer: Params) -> tuple[Tensor, Aux]:
            # Flat, and without what is not batched: vmap walks its arguments several times.
            losses, aux = torch.func.vmap(
                lambda *xs: self.meta_loss(outer, rebuild(xs)),
                randomness=self.randomness,
                chunk_size=self.chunk_size if whole else None,
            )(*chunk)
            return losses.mean() * share if share != 1 else losses.mean(), aux

        if whole:
            return [functools.partial(several, tensors, 1.0)]
        chunks = zip(*(x.split(self.chunk_size or count) for x in tensors), strict=True)
        return [functools.partial(several, list(c), len(c[0]) / count) for c in chunks]

    def _one(self, episode: Any, index: int, count: int, outer: Params) -> tuple[Tensor, Aux]:
        try:
            loss, aux = self.meta_loss(outer, episode)
        except NonFiniteError as error:
            raise NonFiniteError(f"Task {index}: {error}") from error
        return loss / count, aux

    def join(self, aux: list[Aux]) -> Aux:
        """Return the auxiliary outputs of all pieces, stacked on axis 0."""
        together = torch.stack if self.how == "loop" else torch.cat
        joined = aux[0]
        if self.how == "loop" or len(aux) > 1:
            joined = pytree.tree_map(lambda *xs: together(xs), *aux)
        if self.how == "vmap" and not transforming():
            check_finite(joined.inner_losses)
        return joined


def _task_count(tensors: list[Tensor]) -> int:
    sizes = [x.shape[0] if x.ndim else None for x in tensors]
    if not sizes or None in sizes or len(set(sizes)) != 1 or sizes[0] == 0:
        raise ProblemError(
            "episodes must be stacked on axis 0, with one entry for each task in every tensor; "
            f"got axis-0 sizes {sizes}. Stack single episodes with "
            "torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *episodes)."
        )
    return int(sizes[0])  # pyright: ignore[reportArgumentType]
