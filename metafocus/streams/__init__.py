"""Streams: data that differ from inner step to inner step.

A stream is any object with a method `at(step) -> data`. As the support of an episode it gives each
inner step data of its own; as the query it gives each weight of a `path` data of its own. Steps
are counted from 0 over the whole inner loop, also in windows. `at` must be pure: a backward pass
that rebuilds a step asks for its data again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from metafocus import params as pt
from metafocus.errors import ProblemError
from metafocus.streams.fetched import Batches, refuse_loader
from metafocus.torch_internals import pytree

__all__ = [
    "Batches",
    "PerStep",
    "Shared",
    "Stream",
    "Zipped",
    "at",
    "is_stream",
    "opaque",
    "part",
    "refuse_loader",
    "shared",
    "zipped",
]


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
        ProblemError: for a list of batches; at the call, if there are fewer slices than inner
            steps, or no tensors.

    Example:
        >>> batches = PerStep((torch.arange(6).reshape(3, 2), torch.tensor([0, 1, 0])))
        >>> batches.at(1)
        (tensor([2, 3]), tensor(1))
    """

    tree: Any
    first: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.tree, list) and any(isinstance(x, dict | tuple) for x in self.tree):
            raise ProblemError(
                "PerStep takes one tree whose tensors have a leading axis of steps, got a list of "
                f"{len(self.tree)} batches. Stack them: "
                "mf.PerStep(torch.utils.data.default_collate(batches))."
            )

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
        if not inputs:
            kinds = sorted({type(x).__name__ for x in pytree.tree_leaves(self.tree)})
            raise ProblemError(
                f"PerStep holds no tensors, and each step would see all of it: it holds {kinds}. "
                "Pass tensors with a leading axis of steps, such as torch.tensor(x)."
            )
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
        ProblemError: if the argument is not a stream.

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
        ProblemError: if an argument is not a stream.

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
