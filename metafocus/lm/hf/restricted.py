"""A decoder layer at chosen positions only: what is swapped while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
    """

    layer: LastLayer
    rows: Tensor
    mask: Tensor | None


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
        (module, "forward", _at_rows(module, to.rows)) for module in to.layer.by_position
    ]
    if to.mask is not None:
        attention = to.layer.attention
        places.append((attention, "forward", _attending_by(attention.forward, to.mask)))
    with changed(*places), _ACTIVE.set(to):
        yield


def _at_rows(module: nn.Module, rows: Tensor) -> Callable[..., Tensor]:
    forward = module.forward

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flat = x.flatten(0, -2)
        # Fast weights of each example's own need to know whose position is whose.
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
