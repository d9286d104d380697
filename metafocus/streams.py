"""Streams: data that differ from inner step to inner step.

A stream is any object with a method `at(step) -> data`. As the support of an episode it gives each
inner step data of its own; as the query it gives each weight of a `path` data of its own. Steps
are counted from 0 over the whole inner loop, also in windows. `at` must be pure: a backward pass
that rebuilds a step asks for its data again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.utils.data
from torch import Tensor

from metafocus import params as pt
from metafocus.checks import seeded, whole
from metafocus.errors import ProblemError
from metafocus.torch_internals import pytree


class Stream(Protocol):
    """Data by inner step."""

    def at(self, step: int) -> Any:
        """Return what step number `step` sees, counted from 0; the same at every call."""
        ...


@dataclass(frozen=True)
class PerStep:
    """A pytree of tensors with a leading axis of steps: step `t` sees slice `t`.

    A pytree itself, so it stacks over tasks (`[tasks, steps, ...]`), vmaps, and has derivatives.

    Attributes:
        tree: the data, every tensor `[steps, ...]`.
        first: the number of the step that slice 0 belongs to.

    Raises:
        ProblemError: at the call, if there are fewer slices than inner steps.

    Example:
        >>> batches = PerStep((torch.arange(6).reshape(3, 2), torch.tensor([0, 1, 0])))
        >>> batches.at(1)
        (tensor([2, 3]), tensor(1))
    """

    tree: Any
    first: int = 0

    def at(self, step: int) -> Any:
        """Return slice `step` of every tensor."""
        return self._sliced(step, lambda x, i: x[i])

    def part(self, steps: range) -> PerStep:
        """Return the slices of some consecutive steps; their numbers stay."""
        self.at(steps.stop - 1)
        size = len(steps)
        return PerStep(self._sliced(steps.start, lambda x, i: x[i : i + size]), steps.start)

    def _sliced(self, step: int, take: Callable[[Tensor, int], Tensor]) -> Any:
        inputs, rebuild = pt.partition(self.tree)
        index = step - self.first
        short = [list(x.shape) for x in inputs if x.ndim == 0 or x.shape[0] <= index]
        if short or index < 0:
            raise ProblemError(
                f"PerStep has no data for inner step {step} (counted from 0): its tensors need a "
                f"leading axis of more than {index} steps, got shape {(short or [None])[0]}. Give "
                "one slice for each step, or take fewer steps."
            )
        return rebuild([take(x, index) for x in inputs])


def _flatten(stream: PerStep) -> tuple[list[Any], int]:
    return [stream.tree], stream.first


def _unflatten(children: Iterable[Any], first: Any) -> PerStep:
    (tree,) = children
    return PerStep(tree, first)


pytree.register_pytree_node(PerStep, _flatten, _unflatten, serialized_type_name="metafocus.PerStep")


@dataclass(frozen=True)
class Batches:
    """A stream of batches that a function fetches.

    Args:
        fetch: `step -> data`, pure: a rebuilt step calls it again and must get the same data.
        steps: how many batches there are.
        rows: the numbers of the rows in each batch, `[steps, batch_size]`, where they are known
            (`from_dataset`): `mf.zipped(batches, mf.PerStep(weight[batches.rows]))` looks the
            weights of all steps up at once, so that a long vector of weights has one dense
            gradient for the whole loop, not one for each step.
        size: how many rows the data set has, where `rows` are known; None: up to the largest.

    Raises:
        ValueError: if `steps` is no positive integer.
        ProblemError: if `rows` are no row numbers of `steps` batches, or beyond `size`; at the
            call, for a step beyond the last one.

    Example:
        >>> Batches(lambda step: torch.full((2,), float(step)), steps=3).at(2)
        tensor([2., 2.])
    """

    fetch: Callable[[int], Any]
    steps: int
    rows: Tensor | None = field(default=None, repr=False, compare=False)
    size: int | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole("steps", self.steps, 1)
        if self.rows is not None:
            _check_rows(self.rows, self.steps, self.size)

    def at(self, step: int) -> Any:
        """Return `fetch(step)`."""
        if not 0 <= step < self.steps:
            raise ProblemError(
                f"Batches holds {self.steps} steps and was asked for step {step} (counted from "
                "0). Give it as many steps as the inner loop takes, or take fewer."
            )
        return self.fetch(step)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        batch_size: int,
        steps: int,
        generator: torch.Generator,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> Batches:
        """Return shuffled batches of a map-style data set.

        The order is drawn once, here: one permutation of the rows after another until there are
        `steps * batch_size` of them. Each row keeps its number in the data set, so that a loss can
        look its weight up: a row that is a dict gains `"index"`, any other becomes `(index, row)`.

        Args:
            dataset: has `len(dataset)` and `dataset[i]`, such as a `datasets.Dataset`, a
                `torch.utils.data.Dataset` or a list. With `dataset.__getitems__` the rows of a
                batch are read at once.
            batch_size: rows in a batch.
            steps: how many batches.
            generator: draws the order; a CPU generator.
            collate: makes a batch of a list of rows; None: torch's `default_collate`.

        Raises:
            ValueError: for a `batch_size` or `steps` that is no positive integer, or a missing
                generator.
            ProblemError: for a data set without length or rows by number, or an empty one.

        Example:
            >>> rows = [{"x": float(i)} for i in range(4)]
            >>> stream = Batches.from_dataset(
            ...     rows, batch_size=2, steps=2, generator=torch.Generator().manual_seed(0))
            >>> sorted(int(i) for t in range(2) for i in stream.at(t)["index"])
            [0, 1, 2, 3]
        """
        whole("batch_size", batch_size, 1)
        whole("steps", steps, 1)
        seeded(generator)
        refuse_loader(dataset, "dataset must be map-style")
        iterable = isinstance(dataset, torch.utils.data.IterableDataset)
        if iterable or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ProblemError(
                f"dataset must be map-style, with len(dataset) and dataset[i], got "
                f"{type(dataset).__name__}: steps are rebuilt, so rows are read again by number. "
                "Write an iterable data set to a list or a file first."
            )
        if not len(dataset):
            raise ProblemError("dataset is empty: there are no rows to draw batches from.")
        epochs = math.ceil(steps * batch_size / len(dataset))
        order = [torch.randperm(len(dataset), generator=generator) for _ in range(epochs)]
        rows = torch.cat(order)[: steps * batch_size].reshape(steps, batch_size)
        gather = torch.utils.data.default_collate if collate is None else collate
        return cls(_Fetch(dataset, rows, gather), steps, rows, len(dataset))


@dataclass(frozen=True, eq=False)
class _Fetch:
    """Reads the batch of a step; no closure, so that a stream pickles where its data set does."""

    dataset: Any
    rows: Tensor
    gather: Callable[[list[Any]], Any]

    def __call__(self, step: int) -> Any:
        chosen = self.rows[step].tolist()
        together = getattr(self.dataset, "__getitems__", None)
        found = [self.dataset[i] for i in chosen] if together is None else together(chosen)
        return self.gather([_numbered(row, i) for row, i in zip(found, chosen, strict=True)])


def _check_rows(rows: Tensor, steps: int, size: int | None) -> None:
    fits = rows.ndim == 2 and len(rows) == steps and not rows.is_floating_point() and rows.numel()
    if not fits:
        raise ProblemError(
            f"rows must be integers of shape [steps, batch_size] with steps={steps}, got "
            f"{rows.dtype} of shape {list(rows.shape)}."
        )
    least, most = int(rows.min()), int(rows.max())
    if least < 0 or (size is not None and most >= size):
        raise ProblemError(
            f"rows hold the number {least if least < 0 else most}, and the data set has rows 0 to "
            f"{'...' if size is None else size - 1}. Count rows from 0."
        )


def refuse_loader(data: Any, wanted: str) -> None:
    """Raise if data are a `DataLoader`, which cannot give the same batch twice."""
    if isinstance(data, torch.utils.data.DataLoader):
        raise ProblemError(
            f"{wanted}, got a DataLoader, which draws a new order each time; a rebuilt step must "
            "see its data again. Use mf.Batches.from_dataset(loader.dataset, batch_size=..., "
            "steps=..., generator=torch.Generator().manual_seed(0), collate=loader.collate_fn)."
        )


def _numbered(row: Any, index: int) -> Any:
    return {**row, "index": index} if isinstance(row, dict) else (index, row)


@dataclass(frozen=True)
class Shared:
    """A stream that all tasks of `mf.over_tasks` share; made by `mf.shared`."""

    stream: Stream

    def at(self, step: int) -> Any:
        """Return what the stream returns."""
        return self.stream.at(step)


def shared(stream: Stream) -> Shared:
    """Return the stream marked as the same for all tasks of `mf.over_tasks`.

    Without the mark, `over_tasks` stacks a `PerStep` by task and refuses every other stream.

    Raises:
        ProblemError: if the argument is no stream.

    Example:
        >>> batches = Batches(lambda step: torch.zeros(3), steps=5)
        >>> episodes = (torch.zeros(8, 2), torch.zeros(8, 2))  # eight tasks, stacked
        >>> shared(batches).at(0)
        tensor([0., 0., 0.])
    """
    if not is_stream(stream):
        raise ProblemError(
            f"shared needs a stream, an object with .at(step), got {type(stream).__name__}."
        )
    return Shared(stream)


@dataclass(frozen=True)
class Zipped:
    """Several streams side by side; made by `mf.zipped`."""

    streams: tuple[Stream, ...]

    def at(self, step: int) -> tuple[Any, ...]:
        """Return what each stream returns."""
        return tuple(stream.at(step) for stream in self.streams)

    def part(self, steps: range) -> Zipped:
        """Return the streams with no more tensors than some consecutive steps need."""
        return Zipped(tuple(part(stream, steps) for stream in self.streams))


pytree.register_pytree_node(
    Zipped,
    lambda zipped: (list(zipped.streams), None),
    lambda children, _: Zipped(tuple(children)),
    serialized_type_name="metafocus.Zipped",
)


def zipped(*streams: Stream) -> Zipped:
    """Return streams side by side as one stream, whose data are tuples.

    Tensors of a `PerStep` among them stay visible: they have derivatives under every estimator.

    Raises:
        ProblemError: if an argument is no stream.

    Example:
        >>> batches = Batches(lambda step: torch.full((2,), float(step)), steps=3)
        >>> zipped(batches, PerStep(torch.tensor([0.1, 0.2, 0.3]))).at(1)
        (tensor([1., 1.]), tensor(0.2000))
    """
    odd = next((x for x in streams if not is_stream(x)), None)
    if odd is not None or not streams:
        raise ProblemError(
            f"zipped needs streams, objects with .at(step), got {type(odd).__name__}."
        )
    return Zipped(streams)


def is_stream(data: Any) -> bool:
    """Return whether data differ from step to step: whether they have a method `at`."""
    return callable(getattr(data, "at", None))


def at(data: Any, step: int) -> Any:
    """Return what step number `step` sees of `data`: its slice of a stream, or all of it."""
    return data.at(step) if is_stream(data) else data


def part(data: Any, steps: range) -> Any:
    """Return what some consecutive steps see of `data`, with no more tensors than they need."""
    return data.part(steps) if isinstance(data, PerStep | Zipped) else data


def opaque(data: Any) -> list[Any]:
    """Return the streams whose tensors cannot be seen: those that are no pytree."""
    return [x for x in pytree.tree_leaves(data) if is_stream(x)] if is_stream(data) else []
