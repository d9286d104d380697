"""The graphs that were compiled, by the shapes that they are for, up to a number of them."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus.errors import RecompiledWarning
from metafocus.torch_internals import pytree

KEPT = 16
"""How many graphs are kept, of the shapes used last; each holds about 10 MB."""

MANY = 8
"""After so many compilations comes the warning."""

Dims = tuple[tuple[bool, ...], ...]
"""For each tensor, which of its sizes are unknown to a graph."""


class Trace(NamedTuple):
    """A compiled graph.

    Attributes:
        run: tensors to tensors.
        out_spec: how the results are put together.
        closures: what the hypergradient closed over.
        retraces: how often a change of that was followed.
        fits: whether it is right for tensors of other shapes; None: for one set of shapes only.
    """

    run: Callable[..., Any]
    out_spec: pytree.TreeSpec
    closures: dict[str, Any]
    retraces: int
    fits: Callable[[Sequence[Tensor]], bool] | None


class Traces:
    """The graphs of one hypergradient."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Trace] = OrderedDict()
        self._sizes: OrderedDict[Hashable, list[torch.Size]] = OrderedDict()
        self._made = 0

    def find(self, keys: Sequence[Hashable], tensors: Sequence[Tensor]) -> tuple[Any, Trace | None]:
        """Return the first graph under one of the keys that fits, and its key."""
        for key in keys:
            trace = self._kept.get(key)
            if trace is not None and (trace.fits is None or trace.fits(tensors)):
                self._kept.move_to_end(key)
                return key, trace
        return keys[0], None

    def keep(self, key: Hashable, trace: Trace) -> None:
        """Keep a graph that was compiled; drop the one that was not used for the longest time.

        Warns:
            RecompiledWarning: once, after `MANY` compilations.
        """
        self._kept[key] = trace
        self._kept.move_to_end(key)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        # Changes of what is closed over have an error of their own.
        self._made += not trace.retraces
        if self._made == MANY and not trace.retraces:
            warnings.warn(
                f"compiled: {MANY} graphs were compiled for one hypergradient, each for other "
                "shapes, types or constants. Pad the episodes to a few shapes, and pass numbers "
                "that change as tensors.",
                RecompiledWarning,
                stacklevel=3,
            )

    def drop(self, key: Hashable) -> None:
        """Forget a graph."""
        del self._kept[key]

    def changing(self, family: Hashable, tensors: Sequence[Tensor]) -> Dims | None:
        """Return which sizes differ from the first tensors of a family; None for the first ones."""
        sizes = [x.shape for x in tensors]
        first = self._sizes.setdefault(family, sizes)
        self._sizes.move_to_end(family)
        if len(self._sizes) > KEPT:
            self._sizes.popitem(last=False)
        if first is sizes:
            return None
        return tuple(
            tuple(a != b for a, b in zip(one, now, strict=True))
            for one, now in zip(first, sizes, strict=True)
        )
