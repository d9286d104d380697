"""Batches that a function fetches, such as shuffled ones of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.data
from torch import Tensor

from metafocus.checks import function, seeded, whole
from metafocus.errors import ProblemError


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
        ValueError: if `steps` is not a positive integer.
        ProblemError: if `fetch` is not a function of one argument; if `rows` are no row numbers
            of `steps` batches, or beyond `size`; at the call, for a step beyond the last one.

    Example:
        >>> Batches(lambda step: torch.full((2,), float(step)), steps=3).at(2)
        tensor([2., 2.])
    """

    fetch: Callable[[int], Any]
    steps: int
    rows: Tensor | None = field(default=None, repr=False, compare=False)
    size: int | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        function("fetch", self.fetch, "step -> data", 1)
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
            ValueError: for a `batch_size` or `steps` that is not a positive integer, or a missing
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
        if isinstance(dataset, Mapping) or _are_columns(dataset):
            raise ProblemError(
                "dataset must be rows, such as a list of dicts, got "
                f"a {type(dataset).__name__} of columns: write "
                "torch.utils.data.TensorDataset(x, y), or "
                '[{"x": a, "y": b} for a, b in zip(x, y)].'
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


def _are_columns(dataset: Any) -> bool:
    """Return whether data are `(x, y)`, a tuple of tensors with as many rows each."""
    if not isinstance(dataset, tuple) or not all(isinstance(x, Tensor) for x in dataset):
        return False
    return bool(dataset) and all(x.ndim and len(x) == len(dataset[0]) for x in dataset)


def _numbered(row: Any, index: int) -> Any:
    if not isinstance(row, dict):
        return index, row
    if "index" in row and not (isinstance(row["index"], int) and row["index"] == index):
        raise ProblemError(
            f"row {index} of dataset has an entry 'index' of its own, {row['index']!r}, where the "
            "number of the row would go. Rename the entry."
        )
    return {**row, "index": index}


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
