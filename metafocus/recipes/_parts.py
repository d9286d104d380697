"""The parts that problems of several recipes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from metafocus.factories import picklable
from metafocus.types import Params

Loss = Callable[[Params, Any], Tensor]
"""`(params, data) -> scalar`."""

Losses = Callable[[Params, Any], Tensor]
"""`(params, data) -> [n]`, the loss of each sample."""

Start = Callable[[], Params]


@picklable
def of_fast(loss: Loss) -> Callable[[Params, Params, Any], Tensor]:
    """Return the loss of the fast weights, as a problem takes it."""
    return lambda fast, slow, data: loss(fast, data)


@picklable
def mean_of(losses: Losses) -> Callable[[Params, Params, Any], Tensor]:
    """Return the mean of the losses of the samples, as a problem takes it."""
    return lambda fast, slow, data: losses(fast, data).mean()


@picklable
def started(start: Start) -> Callable[[Params, Any], Params]:
    """Return the start as a problem takes it."""
    return lambda slow, support: start()
