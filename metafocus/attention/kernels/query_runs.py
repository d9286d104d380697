"""Spans as runs of queries, each of which a fused kernel serves without any mask."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, overload

import torch
from torch import Tensor

from metafocus.errors import ProblemError
from metafocus.masks.spans import Spans, windowed
from metafocus.torch_internals import (
    is_batched,
    outside_transforms,
    plain,
    tracing,
    version,
)


class _Read(NamedTuple):
    """Spans, the state that their memory was in when they were read, and what it held."""

    spans: Spans
    versions: tuple[int | None, ...]
    content: bytes
    window: int | None


_READ: deque[_Read] = deque(maxlen=8)
"""What `remember` has read. It keeps the spans alive, so that their memory is not used anew."""


class QueryRun(NamedTuple):
    """Consecutive queries of one row, and the keys they see, in the terms of flash kernels.

    With `n` queries and `m` keys, query `i` of the run sees its keys `j` with
    `i + m - n - left <= j <= i + m - n + right`, where a negative bound is no bound: aligned at the
    bottom right, as flash kernels do it. So `(left, right)` is

    - `(-1, -1)` where all queries see the same keys (a bidirectional block),
    - `(-1, 0)` where the end of the interval grows by one per query (causal),
    - `(m - n, 0)` where both ends do (a sliding window),
    - `(m - n, -1)` where only the start does (a block seen through a sliding window).

    Attributes:
        row: Index in the batch.
        query: First query.
        query_end: One past the last query.
        key: First key that any of the queries sees.
        key_end: One past the last key that any of them sees.
        left: Keys to the left of the diagonal, -1 for all.
        right: Keys to the right of the diagonal, -1 for all.
    """

    row: int
    query: int
    query_end: int
    key: int
    key_end: int
    left: int
    right: int

    @property
    def window(self) -> tuple[int, int]:
        """`(left, right)`."""
        return self.left, self.right

    @property
    def queries(self) -> int:
        """The number of queries `n`."""
        return self.query_end - self.query

    @property
    def keys(self) -> int:
        """The number of keys `m`."""
        return self.key_end - self.key


@overload
def find_query_runs(spans: Spans, limit: None = None) -> tuple[QueryRun, ...]: ...


@overload
def find_query_runs(spans: Spans, limit: int) -> tuple[QueryRun, ...] | None: ...


def find_query_runs(spans: Spans, limit: int | None = None) -> tuple[QueryRun, ...] | None:
    """Return the fewest runs that cover all queries which see a key, or None if over `limit`.

    One copy of the spans to the host, unless `remember` has made it; `O(B S)` vectorised work
    there, and a loop over runs; the answers to the last few questions are kept. Spans without
    structure need about one run per query, which no fused kernel serves well: that is what `limit`
    is for.

    Args:
        spans: The intervals, `[B, S]`.
        limit: The number of runs above which the answer is None.

    Returns:
        The runs by row, then by query; queries that see nothing belong to none.

    Raises:
        ProblemError: If a span reaches beyond the keys.

    Example:
        >>> block_then_answer = Spans(torch.zeros(1, 4).long(), torch.tensor([[2, 2, 3, 4]]))
        >>> for run in find_query_runs(block_then_answer):
        ...     print(*run)
        0 0 2 0 2 -1 -1
        0 2 4 0 4 -1 0
    """
    if not spans.start.numel():
        return ()
    known = _known(spans)
    content = _content([spans])[0] if known is None else known.content
    return _found(content, spans.start.shape[-1], limit)


def remember(*several: tuple[int | None, Spans]) -> None:
    """Read spans once, for all layers and passes that attend by them; one copy to the host.

    `find_query_runs` then knows them by their memory as long as they are among the last few, and
    reads them again if they were written to.

    Args:
        several: Spans of one shape that no `vmap` maps over, each with the sliding window that has
            narrowed it; None: no window. Nothing may write to them behind the back of autograd.

    Example:
        >>> causal = Spans(torch.zeros(1, 3).long(), torch.tensor([[1, 2, 3]]))
        >>> remember((None, causal))
        >>> len(find_query_runs(causal))
        1
    """
    windows, found = [w for w, _ in several], [Spans(*map(plain, spans)) for _, spans in several]
    with outside_transforms():
        contents = _content(found)
    for window, spans, content in zip(windows, found, contents, strict=True):
        # Whether inference tensors were written to cannot be seen.
        if None not in versions(spans):
            _READ.append(_Read(spans, versions(spans), content, window))


def narrowed(spans: Spans, window: int) -> Spans:
    """Return `windowed(spans, window)`: the spans themselves, if they are known to be narrow.

    Example:
        >>> causal = Spans(torch.zeros(1, 3).long(), torch.tensor([[1, 2, 3]]))
        >>> narrowed(causal, 2).start.tolist()
        [[0, 0, 1]]
    """
    known = _known(spans)
    return spans if known is not None and known.window == window else windowed(spans, window)


def _known(spans: Spans) -> _Read | None:
    if tracing() or any(map(is_batched, spans)):
        return None
    spans = Spans(*map(plain, spans))
    found = (read for read in reversed(_READ) if same(spans, read.spans, read.versions))
    return next(found, None)


def same(one: Spans, other: Spans, written: tuple[int | None, ...]) -> bool:
    """Return whether both are the same numbers in the same memory, not written to since.

    Args:
        one: Spans.
        other: Spans that are kept alive.
        written: The versions of `other` at an earlier time.
    """
    alike = all(
        (x.data_ptr(), x.shape, x.stride(), x.dtype) == (y.data_ptr(), y.shape, y.stride(), y.dtype)
        for x, y in zip(one, other, strict=True)
    )
    return alike and versions(one) == written


def versions(spans: Spans) -> tuple[int | None, ...]:
    """Return numbers that grow when spans are written to."""
    return tuple(version(x) for x in spans)


def _content(several: Iterable[Spans]) -> list[bytes]:
    """Return the numbers of spans, by one copy to the host."""
    parts = torch.stack([torch.stack(tuple(spans)).long() for spans in several]).cpu()
    return [part.numpy().tobytes() for part in parts]


# Every layer of a model, and every inner step, asks about the same intervals.
@functools.lru_cache(maxsize=8)
def _found(content: bytes, length: int, limit: int | None) -> tuple[QueryRun, ...] | None:
    start, stop = torch.frombuffer(bytearray(content), dtype=torch.long).view(2, -1, length)
    beyond = (start < stop) & ((start < 0) | (stop > length))
    if beyond.any():
        # The slices would have other sizes than the kernel expects: wrong numbers, or a crash.
        row, query = beyond.nonzero()[0].tolist()
        raise ProblemError(
            f"the span of query {query} in row {row} is [{start[row, query].item()}, "
            f"{stop[row, query].item()}), beyond the {length} keys; an interval is "
            "start <= key < stop within [0, S)."
        )
    first, last, step = _equal_steps(start, stop)
    # Two runs that touch share a query: at most every second run can be left without one.
    if limit is not None and len(first) > 2 * limit:
        return None
    pieces = _share_out(zip(first.tolist(), last.tolist(), step.tolist(), strict=True))
    if limit is not None and len(pieces) > limit:
        return None
    ends = torch.tensor([piece[:2] for piece in pieces], dtype=torch.long).reshape(-1, 2).T
    keys = zip(start.flatten()[ends[0]].tolist(), stop.flatten()[ends[1]].tolist(), strict=True)
    found = []
    for (i, j, kind), (key, key_end) in zip(pieces, keys, strict=True):
        row, query = divmod(i, length)
        moved = key_end - key - (j - i + 1)
        left, right = {0: (-1, -1), 1: (-1, 0), 2: (moved, -1), 3: (moved, 0)}[kind]
        found.append(QueryRun(row, query, query + j - i + 1, key, key_end, left, right))
    return tuple(found)


def _equal_steps(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return first token, last token and step of each maximal run of equal steps, batch flattened.

    The step from a query to the next is 0 if the interval stays, 1 if its end moves by one, 2 if
    its start does, 3 if both do. Tokens without any such neighbour are runs of their own.
    """
    some = start < stop
    d0, d1 = start.diff(dim=-1), stop.diff(dim=-1)
    linked = some[:, 1:] & some[:, :-1] & (d0 >= 0) & (d0 <= 1) & (d1 >= 0) & (d1 <= 1)
    link = torch.where(linked, 2 * d0 + d1, -1)
    # The last token of a row has no next one, so that runs end there in the flattened batch.
    link = torch.nn.functional.pad(link, (0, 1), value=-1).flatten()
    before = torch.nn.functional.pad(link, (1, 0), value=-1)[:-1]
    alone = some.flatten() & (link < 0) & (before < 0)
    begins = ((link >= 0) & (link != before)) | alone
    after = torch.nn.functional.pad(link, (0, 1), value=-1)[1:]
    ends = ((link >= 0) & (link != after)) | alone
    first, last = begins.nonzero().flatten(), ends.nonzero().flatten()
    step = link[first]
    return first, last + (step >= 0), step.clamp(min=0)


def _share_out(runs: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Give every query to one run: as early as possible, which needs the fewest runs."""
    pieces: list[tuple[int, int, int]] = []
    taken = -1
    waiting: int | None = None
    for first, last, step in runs:
        # One query left of the run before: this run begins with it, or it stands alone.
        if waiting is not None and first != waiting:
            pieces.append((waiting, waiting, 0))
        waiting = None
        first = max(first, taken + 1)
        taken = max(taken, last)
        if first < last:
            pieces.append((first, last, step))
        elif first == last:
            waiting, taken = first, first - 1
    if waiting is not None:
        pieces.append((waiting, waiting, 0))
    return pieces
