"""Finite sums: losses that are the mean over numbered terms, and how to draw one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.algorithms.common import select
from metafocus.calls import attempted
from metafocus.episodes import as_episode
from metafocus.errors import ProblemError
from metafocus.types import Episode


class Term(NamedTuple):
    """One term of a finite sum: which one, and the data that the loss sees.

    `number` is a scalar integer tensor.
    """

    number: Tensor
    data: Any


@attempted
def draw(data: Any, *, generator: torch.Generator) -> Episode:
    """Return one term of the inner and one of the outer sum, independently and uniformly.

    A term is one entry on axis 0 of every tensor, as the losses take it: an example, or a
    mini-batch of a fixed partition.

    Args:
        data: an episode with all terms of support and query stacked on axis 0.
        generator: a CPU generator; advanced.

    Returns:
        `Episode(Term, Term)`, for `SABA.step`.

    Raises:
        ProblemError: if the tensors of one half disagree about the number of terms.

    Example:
        >>> data = Episode(torch.arange(5) * 10, torch.arange(3) * 100)
        >>> support, query = draw(data, generator=torch.Generator().manual_seed(0))
        >>> bool(support.data == 10 * support.number)
        True
    """
    support, query = as_episode(data)
    return Episode(_pick(support, "support", generator), _pick(query, "query", generator))


def terms(data: Any, name: str) -> int:
    """Return how many terms are stacked on axis 0."""
    sizes = {x.shape[0] if x.ndim else 0 for x in pt.tensors(data)}
    if len(sizes) != 1 or 0 in sizes:
        raise ProblemError(
            f"{name} must hold all terms of a finite sum, stacked on axis 0 of every tensor; got "
            f"axis-0 sizes {sorted(sizes)}."
        )
    return sizes.pop()


def _pick(data: Any, name: str, generator: torch.Generator) -> Term:
    index = torch.randint(terms(data, name), (), generator=generator)
    return Term(index, select(data, index))
