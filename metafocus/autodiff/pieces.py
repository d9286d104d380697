"""The gradient of a batch piece by piece, for first and second derivatives alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff import grad as derivatives
from metafocus.autodiff.recompute import recompute
from metafocus.checks import function, whole
from metafocus.errors import ProblemError
from metafocus.factories import picklable
from metafocus.types import InnerLoss, Params


def rows_of(data: Any) -> int:
    """Return how many rows a batch has: the size of axis 0 of its tensors.

    Raises:
        ProblemError: if its tensors disagree, or there are none.
    """
    sizes = {x.shape[0] for x in pt.tensors(data) if x.ndim}
    if len(sizes) != 1:
        raise ProblemError(
            "micro_batches cuts the tensors of a batch along axis 0, and they must have one size "
            f"there, got {sorted(sizes)}. Put what all rows share into slow, or give it no axis."
        )
    return sizes.pop()


@picklable
def micro_batches(
    loss: InnerLoss, pieces: int, *, count: Callable[[Any], Any] = rows_of
) -> InnerLoss:
    """Return the same loss, computed and differentiated on `pieces` parts of its batch in turn.

    `loss(data) = sum_i count(data_i) loss(data_i) / sum_i count(data_i)`. No graph of a piece is
    kept: the gradient of a piece is rebuilt for the second derivative too, so the peak memory of
    the double backward pass is that of one piece. Each derivative evaluates the loss once more.
    Under every estimator and transform, as `mf.recompute`.

    Args:
        loss: a mean over the rows of its data, or over what `count` counts in them. Sums over the
            batch, batch norm and other terms that mix rows are not such a mean.
        pieces: how many parts; fewer where a batch has fewer rows.
        count: what the mean runs over, a number for each piece: by default its rows. For a mean
            over the scored tokens of chats: `lambda batch: (batch["labels"] != -100).sum()`.

    Returns:
        `(fast, slow, data) -> scalar`.

    Raises:
        ValueError: if `pieces` is not a positive integer.
        ProblemError: if `loss` is not a function; at the call, if the tensors of the data have
            different sizes on axis 0.

    Example:
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).mean()
        >>> small = micro_batches(loss, 4)
        >>> small({"w": torch.zeros(())}, {}, torch.arange(6.0))
        tensor(9.1667)
    """
    function("loss", loss, "(fast, slow, data) -> scalar", 3)
    whole("pieces", pieces, 1)

    def accumulated(fast: Params, slow: Params, data: Any) -> Tensor:
        parts = _cut(data, pieces)
        counts = [count(part) for part in parts]
        total, number = None, sum(counts[1:], start=counts[0])
        for part, share in zip(parts, counts, strict=True):
            value = recompute(loss, fast, slow, part, pullback=_pullback(loss)) * share / number
            total = value if total is None else total + value
        assert total is not None
        return total

    return accumulated


def _cut(data: Any, pieces: int) -> list[Any]:
    rows = rows_of(data)
    inputs, rebuild = pt.partition(data, lambda x: x.ndim > 0)
    size = -(-rows // min(pieces, rows))
    return [rebuild(part) for part in zip(*(x.split(size) for x in inputs), strict=True)]


def _pullback(loss: InnerLoss) -> Callable[..., Any]:
    """Return the pullback of a loss, itself rebuilt when a derivative of it is asked for."""

    def run(args: tuple[Any, ...], cotangent: Tensor) -> tuple[Any, ...]:
        # All tensors are arguments, integers too: `recompute` must see what a transform wraps.
        inputs, rebuild = pt.partition(args)

        def gradient(xs: Sequence[Tensor], c: Tensor) -> list[Tensor | None]:
            wanted = [pt.is_differentiable(x) for x in xs]
            found = derivatives.pullback(lambda *ys: [loss(*rebuild(ys))], xs, [c], wanted)
            return [
                torch.zeros_like(x) if g is None and w else g
                for x, g, w in zip(xs, found, wanted, strict=True)
            ]

        return rebuild(recompute(gradient, inputs, cotangent))

    return run
