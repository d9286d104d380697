"""Finds the evidence of a chat in its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from metafocus.data.messages import Message
from metafocus.data.token_offsets import Tokens
from metafocus.errors import DataError

_PRIVATE_USE = range(0xE000, 0xF900)


def needles(
    messages: Sequence[Message],
    text: str,
    tokens: Tokens,
    render: Callable[[Sequence[Message]], str],
) -> list[bool]:
    """Return which tokens overlap the evidence.

    The chat is rendered once more with an unused character at both ends of each span.

    Raises:
        DataError: if the tokenizer does not know the characters of its tokens, or if the template
            drops, trims or repeats evidence.
    """
    if tokens.offsets is None:
        raise DataError(
            "evidence needs a tokenizer that knows the characters of each token: use its fast "
            "version (tokenizer.is_fast), or leave evidence out"
        )
    fence = next(chr(code) for code in _PRIVATE_USE if chr(code) not in text)
    fenced, count = list(messages), 0
    for i, message in enumerate(messages):
        edges = _merged_edges(message.get("evidence") or [])
        if edges:
            cuts = [0, *edges, len(message["content"])]
            parts = [message["content"][start:stop] for start, stop in pairwise(cuts)]
            fenced[i] = {**message, "content": fence.join(parts)}
            count += len(edges)
    pieces = render(fenced).split(fence)
    if "".join(pieces) != text or len(pieces) != count + 1:
        raise DataError(
            "evidence cannot be traced into the rendered chat, because the template drops, trims "
            "or repeats that text: let the spans cover only characters that the template keeps"
        )
    edges = list(accumulate(len(piece) for piece in pieces[:-1]))
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    return [any(a < stop and start < b for a, b in spans) for start, stop in tokens.offsets]


def _merged_edges(spans: Sequence[Sequence[int]]) -> list[int]:
    """Return starts and stops in order, after joining spans that overlap or touch."""
    edges: list[int] = []
    for start, stop in sorted((span[0], span[1]) for span in spans):
        if edges and start <= edges[-1]:
            edges[-1] = max(edges[-1], stop)
        else:
            edges += [start, stop]
    return edges
