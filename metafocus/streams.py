"""Streams: data that differ from inner step to inner step.

A stream is any object with a method `at(step) -> data`. As the support of an episode it gives each
inner step data of its own; as the query it gives each weight of a `path` data of its own. Steps
are counted from 0 over the whole inner loop, also in windows. `at` must be pure: a backward pass
that rebuilds a step asks for its data again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.checks import seeded, whole
from metafocus.errors import ProblemError
from metafocus.torch_internals import outside_transforms, pytree, tracing


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

    Raises:
        ValueError: if `steps` is no positive integer.
        ProblemError: at the call, for a step beyond the last one.

    Example:
        >>> Batches(lambda step: torch.full((2,), float(step)), steps=3).at(2)
        tensor([2., 2.])
    """

    fetch: Callable[[int], Any]
    steps: int

    def __post_init__(self) -> None:
        whole("steps", self.steps, 1)

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
            dataset: has `len(dataset)` and `dataset[i]`.
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
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ProblemError(
                f"dataset must be map-style, with len(dataset) and dataset[i], got "
                f"{type(dataset).__name__}. Pass the data set itself, not a DataLoader."
            )
        if not len(dataset):
            raise ProblemError("dataset is empty: there are no rows to draw batches from.")
        rows: list[int] = []
        while len(rows) < steps * batch_size:
            rows += torch.randperm(len(dataset), generator=generator).tolist()
        gather = torch.utils.data.default_collate if collate is None else collate

        def fetch(step: int) -> Any:
            chosen = rows[step * batch_size : (step + 1) * batch_size]
            return gather([_numbered(dataset[i], i) for i in chosen])

        return cls(fetch, steps)


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


def is_stream(data: Any) -> bool:
    """Return whether data differ from step to step: whether they have a method `at`."""
    return callable(getattr(data, "at", None))


def at(data: Any, step: int) -> Any:
    """Return what step number `step` sees of `data`: its slice of a stream, or all of it."""
    return data.at(step) if is_stream(data) else data


def part(data: Any, steps: range) -> Any:
    """Return what some consecutive steps see of `data`, with no more tensors than they need."""
    return data.part(steps) if isinstance(data, PerStep) else data


def is_opaque(data: Any) -> bool:
    """Return whether data are a stream whose tensors cannot be seen: one that is no pytree."""
    return is_stream(data) and any(x is data for x in pytree.tree_leaves(data))


class Watched:
    """A stream that notices when a rebuilt step is given other data than the first time."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.seen: dict[int, list[Tensor]] = {}
        self.checked = False

    def at(self, step: int) -> Any:
        """Return what the stream returns; compare the first batch that is asked for again.

        Raises:
            ProblemError: if it differs.
        """
        data = self.stream.at(step)
        if self.checked or tracing():
            return data
        with outside_transforms(), torch.no_grad():
            sums = _checksum(pt.tensors(data))
            if step not in self.seen:
                self.seen[step] = sums
            else:
                self.checked = True
                before, self.seen = self.seen[step], {}
                if len(before) != len(sums) or not all(map(_equal, before, sums)):
                    raise ProblemError(
                        f"the stream gave other data for inner step {step} when the step was "
                        "rebuilt for its derivative: .at(step) must be pure. Draw the order of "
                        "rows and random augmentations before the inner loop, by step number "
                        "(mf.Batches.from_dataset does), or keep the graph: Unrolled() without "
                        "recompute."
                    )
        return data


def _checksum(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a few sums of each tensor, on its device: nothing waits for a host."""
    found = []
    for x in tensors:
        # Sparse and jagged tensors have no entries in a fixed order.
        if x.layout is not torch.strided:
            continue
        flat = torch.view_as_real(x) if x.is_complex() else x
        flat = flat.detach().reshape(-1).double()
        # A weight for each place, so that another order of the rows is seen.
        places = torch.arange(flat.numel(), device=flat.device, dtype=flat.dtype).cos()
        found.append(torch.stack([flat.sum(), flat @ places, flat.new_tensor(flat.numel())]))
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    # The sums of data with NaN in them are NaN.
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def watched(data: Any) -> Any:
    """Return `data`, a stream without visible tensors wrapped so that a rebuild is compared."""
    return Watched(data) if is_opaque(data) else data
