"""Encodes one chat as a training sample: token ids, turn ids, answer mask and evidence mask.

Turn ids come from the boundaries of the messages, not from the answer mask. So an assistant turn
that is empty or not trained separates its neighbours like any other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metafocus.checks import whole
from metafocus.data.boundaries import (
    RenderedChat,
    RewrittenError,
    assistant_spans,
    is_space,
    message_ends,
    render,
    render_text,
    spans_from_marks,
    unused_character,
)
from metafocus.data.messages import Message, check_messages
from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sample = dict[str, Tensor]  # 1-D tensors of one length, under the names of a batch


def encode_chat(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Any] | None = None,
    merge_context: bool = True,
    max_length: int | None = None,
) -> Sample:
    """Tokenise one chat with the tokenizer's own template into 1-D tensors of one length S.

    The sample has `input_ids` [S] int64, `turn_ids` [S] int64 and `answer_mask` [S] bool. The
    answer mask marks the content and the end-of-turn token of every assistant message whose
    `weight` is not 0. The sample also has `needle_mask` [S] bool if a message has `evidence`, a
    list of character spans [start, end) of its content.

    A template with `{% generation %}` defines which tokens are answers. With any other template an
    answer is the text that the message adds to the generation prompt. With `merge_context`,
    consecutive non-assistant messages and the header of the next assistant message share one turn.
    Without it, every message with its header is a turn. An assistant message always ends a turn.

    Args:
        messages: dicts with `role` and `content`; an assistant message may have `tool_calls`.
        tokenizer: a Hugging Face tokenizer with a chat template.
        tools: function descriptions for the template.
        merge_context: whether consecutive non-assistant messages form one turn.
        max_length: the largest number of tokens; the rest is cut on the tokenizer's
            `truncation_side`.

    Raises:
        DataError: if messages are malformed, if there is no chat template, if the template
            refuses the chat or changes earlier messages, or if evidence cannot be located in the
            tokens.

    Example:
        >>> from metafocus.data import encode_chat
        >>> from metafocus.data.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["a tiny text"])
        >>> chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
        >>> sample = encode_chat(chat, tokenizer)
        >>> tokenizer.decode(sample["input_ids"][sample["answer_mask"]])
        'yo<|im_end|>'
        >>> sample["turn_ids"].unique().tolist()
        [0, 1]
    """
    check_messages(messages)
    check_max_length(max_length)
    chat = render(messages, tokenizer, tools)
    try:
        spans = assistant_spans(chat)
        ends = None if merge_context else message_ends(chat)
    except RewrittenError as error:
        spans, ends = spans_from_marks(chat, merge_context, error), None

    size = len(chat.ids)
    sample = {
        "input_ids": torch.tensor(chat.ids, dtype=torch.int64),
        "turn_ids": torch.tensor(_turn_ids(size, spans, ends), dtype=torch.int64),
        "answer_mask": torch.tensor(_answers(chat, spans), dtype=torch.bool),
    }
    if any(message.get("evidence") for message in messages):
        sample["needle_mask"] = torch.tensor(_needles(chat), dtype=torch.bool)
    return truncate(sample, max_length, tokenizer.truncation_side)


def truncate(sample: Sample, max_length: int | None, side: str) -> Sample:
    """Return the first (`side="right"`) or last (`"left"`) `max_length` tokens of a sample."""
    if max_length is None or len(sample["input_ids"]) <= max_length:
        return sample
    kept = slice(max_length) if side == "right" else slice(-max_length, None)
    return {name: values[kept].clone() for name, values in sample.items()}


def check_max_length(max_length: int | None) -> None:
    """Raise for a length that leaves no token to predict.

    Raises:
        DataError: if `max_length` is not an integer, or below 2.
    """
    if max_length is not None:
        note = " or None: a token is predicted from another one"
        whole("max_length", max_length, 2, note=note, error=DataError)


def _turn_ids(size: int, spans: list[tuple[int, int]], ends: list[int] | None) -> list[int]:
    """Return one turn per message if `ends` is given, else even ids for context and odd ones."""
    stops = [edge for span in spans for edge in span] if ends is None else ends
    return [bisect_right(stops, position) for position in range(size)]


def _answers(chat: RenderedChat, spans: list[tuple[int, int]]) -> list[bool]:
    added = chat.tokenizer.added_tokens_decoder
    special = {i for i in added if added[i].special}.union(chat.tokenizer.all_special_ids)
    answers = [False] * len(chat.ids) if chat.marks is None else list(chat.marks)
    assistants = (message for message in chat.messages if message["role"] == "assistant")
    for (start, stop), message in zip(spans, assistants, strict=True):
        if message.get("weight") == 0:
            answers[start:stop] = [False] * (stop - start)
            continue
        if chat.marks is None:
            answers[start:stop] = [True] * (stop - start)
        ends = [i for i in range(start, stop) if chat.ids[i] in special]
        if ends and is_space(chat, ends[-1] + 1, stop):
            answers[ends[-1] + 1 : stop] = [False] * (stop - ends[-1] - 1)
    return answers


def _needles(chat: RenderedChat) -> list[bool]:
    """Return which tokens overlap the evidence.

    The chat is rendered once more with an unused character at both ends of each span.
    """
    if chat.offsets is None:
        raise DataError(
            "evidence needs a tokenizer that knows the characters of each token: use its fast "
            "version (tokenizer.is_fast), or leave evidence out"
        )
    fence = unused_character(chat.text)
    fenced, count = list(chat.messages), 0
    for i, message in enumerate(chat.messages):
        edges = _merged_edges(message.get("evidence") or [])
        if edges:
            cuts = [0, *edges, len(message["content"])]
            parts = [message["content"][start:stop] for start, stop in pairwise(cuts)]
            fenced[i] = {**message, "content": fence.join(parts)}
            count += len(edges)
    pieces = render_text(fenced, chat.tokenizer, chat.tools).split(fence)
    if "".join(pieces) != chat.text or len(pieces) != count + 1:
        raise DataError(
            "evidence cannot be traced into the rendered chat, because the template drops, trims "
            "or repeats that text: let the spans cover only characters that the template keeps"
        )
    edges = list(accumulate(len(piece) for piece in pieces[:-1]))
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    return [any(a < stop and start < b for a, b in spans) for start, stop in chat.offsets]


def _merged_edges(spans: Sequence[Sequence[int]]) -> list[int]:
    """Return starts and stops in order, after joining spans that overlap or touch."""
    edges: list[int] = []
    for start, stop in sorted((span[0], span[1]) for span in spans):
        if edges and start <= edges[-1]:
            edges[-1] = max(edges[-1], stop)
        else:
            edges += [start, stop]
    return edges
