"""The measures of a profile, computed from sums over the attention matrix of each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from einops import rearrange, reduce
from torch import Tensor

from metafocus.diagnostics.roles import SINKS, Tokens
from metafocus.diagnostics.sums import CONTEXT, EFFECTIVE, ENTROPY, FEW, FIRST, NEEDLE, Sums

QUERIES = ("answer", "context", "all")
"""Sets of queries: tokens of trained answers, all other tokens except padding, and both."""


@dataclass(frozen=True)
class Measures:
    """Means over a set of queries, each of the same shape: `[layers]`, or `[layers, heads]`.

    `p_ij` is the probability that query `i` gives to key `j`. The mean of an empty set is NaN.

    Attributes:
        sink_mass: Mass on the first key of the document, over queries from the second on.
        sink_mass_4: Mass on its first four keys, over queries from the fifth on.
        context_engagement: Mass on keys that are neither an answer, nor the first key, nor the
            query itself.
        needle_mass: Mass on the evidence, over documents that have evidence. None if the batch
            has no `needle_mask`.
        max_column_mass: `max_j mean_i p_ij` of each document. The documents are averaged with
            their numbers of queries as weights.
        max_column_index: The index, in its document, of the key with the largest mean of all.
        entropy: `- sum_j p_ij log p_ij`, in nats.
        effective_keys: `exp` of each query's entropy.
    """

    sink_mass: Tensor
    sink_mass_4: Tensor
    context_engagement: Tensor
    needle_mass: Tensor | None
    max_column_mass: Tensor
    max_column_index: Tensor
    entropy: Tensor
    effective_keys: Tensor

    def items(self) -> list[tuple[str, Tensor]]:
        """Return names and tensors, without `needle_mass` if there is no evidence."""
        pairs = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in pairs if value is not None]

    def cpu(self) -> Measures:
        """Return the same measures on the CPU."""
        moved = {name: value.cpu() for name, value in self.items()}
        return Measures(**{"needle_mass": None, **moved})


def stack(measures: Sequence[Measures]) -> Measures:
    """Stack the measures of layers."""
    columns: dict[str, list[Tensor]] = {}
    for one in measures:
        for name, value in one.items():
            columns.setdefault(name, []).append(value)
    stacked = {name: torch.stack(values) for name, values in columns.items()}
    return Measures(**{"needle_mass": None, **stacked})


def summarise(sums: Sums, tokens: Tokens, which: int) -> tuple[Measures, Measures]:
    """Return the measures of a layer over one set of queries: heads averaged `[]`, and `[H]`."""
    member = tokens.queries[:, which]
    rows = sums.rows.double()

    def mean(column: int, chosen: Tensor) -> Tensor:
        weight = chosen.to(rows.dtype)
        # For an empty set this is 0 / 0 = NaN.
        return torch.einsum("bhs,bs->h", rows[..., column], weight) / weight.sum()

    late = [member & (tokens.position >= n) for n in SINKS]
    by_head: dict[str, Tensor | None] = {
        "sink_mass": mean(FIRST, late[0]),
        "sink_mass_4": mean(FEW, late[1]),
        "context_engagement": mean(CONTEXT, member),
        "needle_mass": None,
        "entropy": mean(ENTROPY, member),
        "effective_keys": mean(EFFECTIVE, member),
    }
    if tokens.needle is not None:
        has = tokens.per_document(tokens.needle.long()) > 0
        has = torch.cat((has, has.new_zeros(1)))
        by_head["needle_mass"] = mean(NEEDLE, member & has[tokens.document])
    columns = sums.columns[:, :, which].double()
    largest = _largest_column(tokens, member)
    heads = _with_columns(by_head, *largest(rearrange(columns, "b h s -> h b s")))
    means = {name: None if x is None else x.mean() for name, x in by_head.items()}
    mass, index = largest(reduce(columns, "b h s -> 1 b s", "mean"))
    return _with_columns(means, mass[0], index[0]), heads


def _with_columns(values: dict[str, Tensor | None], mass: Tensor, index: Tensor) -> Measures:
    return Measures(**values, max_column_mass=mass, max_column_index=index)  # pyright: ignore


def _largest_column(tokens: Tokens, member: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a function from sums over queries to the largest mean column and its index.

    The sums are `[n, B, S]`, and both results are `[n]`.
    """
    count = tokens.per_document(member.double())
    document = tokens.document.flatten()
    queries = torch.cat((count, count.new_zeros(1)))[document]

    def largest(columns: Tensor) -> tuple[Tensor, Tensor]:
        # Padding, and keys of documents without such queries, are not candidates.
        mass = torch.where(queries > 0, columns.flatten(1) / queries.clamp(min=1), -1.0)
        top = mass.new_zeros(len(mass), tokens.documents + 1)
        top = top.scatter_reduce(1, document.expand_as(mass), mass, "amax")[:, :-1]
        mean = (top * count).sum(1) / count.sum()
        index = tokens.position.flatten()[mass.argmax(1)]
        return mean, index.masked_fill(count.sum() == 0, -1)

    return largest
