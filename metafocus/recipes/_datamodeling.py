"""The linear datamodeling score: whether scores predict training without some examples."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import NamedTuple

import torch
from torch import Tensor

from metafocus.checks import fraction, seeded, whole


class Score(NamedTuple):
    """How well scores predict what training without some examples does.

    Attributes:
        each: `[queries]`, Spearman's correlation of predicted and true losses over the subsets.
        predicted: `[subsets, queries]`, sums of scores of the examples that were kept.
        found: `[subsets, queries]`, losses after training on them.
    """

    each: Tensor
    predicted: Tensor
    found: Tensor

    @property
    def mean(self) -> float:
        """The mean over queries: the linear datamodeling score."""
        return self.each.mean().item()


def linear_datamodeling_score(
    scores: Tensor,
    retrained: Callable[[Tensor], Tensor],
    *,
    subsets: int = 60,
    drop: float = 0.05,
    generator: torch.Generator,
    executor: Executor | None = None,
) -> Score:
    """Return how well scores rank the losses of runs without random subsets of the examples.

    Args:
        scores: `[queries, rows]`, such as `Attribution.scores`.
        retrained: `(weights [runs, rows]) -> [runs, queries]`, such as `Attribution.retrained`.
        subsets: how many runs.
        drop: the share of examples left out of each, at random; at least one example.
        generator: draws the subsets.
        executor: runs the subsets one by one, such as a process pool or submitit's; None: here,
            all in one call.

    Raises:
        ValueError: for fewer than two subsets, a `drop` outside of [0, 1), or one that leaves no
            example out: all runs would be equal, and the score NaN.

    Example:
        >>> scores = torch.tensor([[-3.0, -2.0, 1.0, 0.0]])
        >>> result = linear_datamodeling_score(
        ...     scores, lambda weights: (weights @ scores.T) ** 3, subsets=9, drop=0.5,
        ...     generator=torch.Generator().manual_seed(0))
        >>> round(result.mean, 6)
        1.0

    References:
        Park et al., TRAK, arXiv 2303.14186, section 2.
    """
    whole("subsets", subsets, 2)
    fraction("drop", drop)
    seeded(generator)
    rows = scores.shape[1]
    left_out = round(drop * rows)
    if not left_out:
        raise ValueError(
            f"drop={drop} of {rows} examples leaves none out. Raise drop to {1 / rows:.2g} or more."
        )
    weights = scores.new_ones(subsets, rows)
    for weight in weights:
        weight[torch.randperm(rows, generator=generator)[:left_out]] = 0
    if executor is None:
        found = retrained(weights)
    else:
        found = torch.cat(list(executor.map(retrained, weights.split(1))))
    predicted = weights @ scores.T
    each = [spearman(a, b) for a, b in zip(predicted.T, found.T, strict=True)]
    return Score(torch.stack(each), predicted, found)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's rank correlation of two vectors; equal values share their mean rank.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.0, 5.0, 6.0])).item()
        1.0
    """
    return torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1]


def _ranks(x: Tensor) -> Tensor:
    _, group, count = torch.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[group]
