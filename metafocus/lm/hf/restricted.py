"""A decoder layer at chosen positions only: what is swapped while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metafocus.adapters import slots
from metafocus.adapters.low_rank import of_examples
from metafocus.calls import changed
from metafocus.calls.blocks import Scoped

_MOST = 0.75
"""Above this part of all positions, choosing them costs more than it saves."""


class LastLayer(NamedTuple):
    """The parts of a last layer that this file replaces.

    Attributes:
        attention: Its attention.
        by_position: Modules that treat each position by itself.
    """

    attention: nn.Module
    by_position: tuple[nn.Module, ...]


class Restriction(NamedTuple):
    """What the last layer computes.

    Attributes:
        layer: Its parts.
        rows: Flat indices of positions, `[n]`.
        mask: Stacked spans in which the queries of other positions see nothing; None where the
            model takes no spans.
        others: For a check: what all positions are run with, in place of the other positions'
            inputs; None: the other positions are left out.
    """

    layer: LastLayer
    rows: Tensor
    mask: Tensor | None
    others: float | None = None


_ACTIVE: Scoped[Restriction | None] = Scoped(None)


def active() -> Restriction | None:
    """Return the restriction that holds now, for a recomputation."""
    return _ACTIVE.get()


@contextlib.contextmanager
def restricted(to: Restriction | None) -> Iterator[None]:
    """Let the last layer compute some positions only inside a `with` block.

    Args:
        to: The positions; None, or what holds already, changes nothing.
    """
    if to is None or to is _ACTIVE.get():
        yield
        return
    places: list[Any] = [
        (module, "forward", _at_rows(module, to)) for module in to.layer.by_position
    ]
    if to.mask is not None:
        attention = to.layer.attention
        places.append((attention, "forward", _attending_by(attention.forward, to.mask)))
    with changed(*places), _ACTIVE.set(to):
        yield


def _at_rows(module: nn.Module, to: Restriction) -> Callable[..., Tensor]:
    forward, rows = module.forward, to.rows

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flat = x.flatten(0, -2)
        if to.others is not None:
            filled = torch.full_like(flat, to.others).index_copy(0, rows, flat[rows])
            return forward(filled.view_as(x), *args, **kwargs)
        # Fast weights for each example need to know which row a position belongs to.
        if len(rows) > _MOST * len(flat) or of_examples(slots.bound(module)):
            return forward(x, *args, **kwargs)
        chosen = forward(flat.index_select(0, rows).unsqueeze(0), *args, **kwargs).squeeze(0)
        whole = chosen.new_zeros(len(flat), chosen.shape[-1]).index_copy(0, rows, chosen)
        return whole.unflatten(0, x.shape[:-1])

    return run


def _attending_by(forward: Callable[..., Any], mask: Tensor) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, "attention_mask": mask})

    return run
