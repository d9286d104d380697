"""Encodes one chat as a training sample: token ids, turn ids, answer mask and evidence mask.

Turn ids come from the boundaries of the messages, not from the answer mask. So an assistant turn
that is empty or not trained separates its neighbours like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from metafocus.checks import whole
from metafocus.data.answers import Finder
from metafocus.data.boundaries import RenderedChat
from metafocus.data.lost_texts import lost, lost_reasoning, training_template
from metafocus.data.messages import (
    Message,
    check_messages,
    from_arrow,
    is_trained,
    last_answer,
    without_nulls,
)
from metafocus.data.needles import needles
from metafocus.data.rendering import Form, Renderer, forms
from metafocus.data.token_offsets import Tokens
from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sample = dict[str, Tensor]  # 1-D tensors of one length, under the names of a batch

TURNS = ("as_rendered", "last", "each")


def encode_chat(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Any] | None = None,
    merge_context: bool = True,
    max_length: int | None = None,
    turns: str = "as_rendered",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Sample:
    """Tokenise one chat with the tokenizer's own template into 1-D tensors of one length S.

    The sample has `input_ids` [S] int64, `turn_ids` [S] int64 and `answer_mask` [S] bool. The
    answer mask marks the content and the stop token of every assistant message, unless its
    `weight` is 0 or its `train` is false. The sample also has `needle_mask` [S] bool if a message
    has `evidence`, a list of character spans [start, end) of its content.

    A template with `{% generation %}` defines where answers begin. With any other template an
    answer is what the message adds to the generation prompt. With `merge_context`, consecutive
    non-assistant messages and the header of the next assistant message share one turn. Without it,
    every message with its header is a turn. An assistant message always ends a turn.

    Args:
        messages: dicts with `role` and `content`; an assistant message may have `tool_calls`.
        tokenizer: a Hugging Face tokenizer with a chat template.
        tools: function descriptions for the template.
        merge_context: whether consecutive non-assistant messages form one turn.
        max_length: the largest number of tokens; the rest is cut on the tokenizer's
            `truncation_side`.
        turns: "as_rendered" trains every answer as it stands in the whole chat, "last" only the
            last answer, as the last message of the chat.
        chat_template_kwargs: more variables of the template, such as `enable_thinking`.

    Raises:
        DataError: if messages are malformed, if there is no chat template, if the template
            refuses the chat or does not render all of it, or if an answer or evidence cannot be
            located in the tokens.

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
    if isinstance(messages, list) and from_arrow(messages):
        messages, tools = without_nulls(messages), without_nulls(tools)
    check_messages(messages)
    check_max_length(max_length)
    if turns not in TURNS[:2]:
        raise DataError(
            f"turns={turns!r} must be one of {', '.join(TURNS[:2])} for a single chat; "
            "encode_chats also takes turns='each'"
        )
    encoder = Encoder(tokenizer, merge_context, chat_template_kwargs)
    if turns == "last":
        messages = last_answer(messages)
    made = encoder.encode(messages, tools)
    return truncate(made.sample, max_length, tokenizer.truncation_side)


class Made(NamedTuple):
    """A sample, and what the summary says of it.

    Attributes:
        sample: 1-D tensors.
        unstopped: the number of trained answers whose last trained token is plain text.
        rewritten: the number of trained answers that are rendered differently as last messages.
    """

    sample: Sample
    unstopped: int
    rewritten: int


class _Prepared(NamedTuple):
    given: Sequence[Message]
    chat: RenderedChat
    form: Form


class Encoder:
    """Encodes chats, and remembers what it learned about the template.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        merge_context: whether consecutive non-assistant messages form one turn.
        variables: more variables of the template.
        template: instead of the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        merge_context: bool = True,
        variables: Mapping[str, Any] | None = None,
        template: str | None = None,
    ):
        self._tokenizer, self._merge_context = tokenizer, merge_context
        self._variables = variables
        self._renderer = Renderer(tokenizer, variables, template)
        self._finder = Finder(self._renderer)
        self._form = Form()

    def encode(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Made:
        """Return the sample of one chat whose messages were checked."""
        (made,) = self.encode_all([(messages, tools)])
        if isinstance(made, DataError):
            raise made
        return made

    def encode_all(
        self, chats: Sequence[tuple[Sequence[Message], Sequence[Any] | None]]
    ) -> list[Made | DataError]:
        """Return the sample of each chat, or why it cannot be encoded.

        Many chats are tokenised at once, because the tokenizer works in several threads.
        """
        prepared = [self._caught(self._prepare, messages, tools) for messages, tools in chats]
        good = [one for one in prepared if isinstance(one, _Prepared)]
        texts = [one.chat.found.text for one in good]
        tokens = iter(Tokens.of(self._tokenizer, texts, self._finder.controls) if texts else [])
        return [
            self._caught(self._sample, one, next(tokens)) if isinstance(one, _Prepared) else one
            for one in prepared
        ]

    @staticmethod
    def _caught(function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except DataError as error:
            return error

    def _prepare(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> _Prepared:
        """Render a chat in the first form of its messages of which the template renders all."""
        tool_list = list(tools) if tools else None
        first: DataError | None = None
        possible = list(forms(messages))
        # The form that the last chat needed is probably the right one.
        possible.sort(key=lambda form: form != self._form)
        for form in possible:
            try:
                chat = self._rendered(messages, tool_list, form)
            except DataError as error:
                # The final error is that of the messages as they are.
                if first is None or form == Form():
                    first = error
                continue
            self._form = form
            return _Prepared(messages, chat, form)
        assert first is not None, "forms yields at least one"
        raise DataError(f"{first}{self._advice(messages, tool_list)}") from first

    def _advice(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        """Return what helps against a text that is not rendered."""
        better = training_template(self._renderer.template(tools))
        if better is not None:
            text = better.read_text(encoding="utf-8")
            other = Encoder(self._tokenizer, self._merge_context, self._variables, text)
            for form in forms(messages):
                with suppress(DataError):
                    if lost_reasoning(other._rendered(messages, tools, form), messages) is None:
                        return f"; trl's template for training does: --chat_template {better}"
        return ""

    def _rendered(
        self, messages: Sequence[Message], tools: list[Any] | None, form: Form
    ) -> RenderedChat:
        inner = form.messages(messages)
        found = self._renderer.located(inner, tools)
        if found is None:
            raise DataError(
                "the template renders the chat differently when its texts change, or again "
                "differently every time, so the texts cannot be traced to tokens: use a template "
                "that renders the texts as they are"
            )
        _check_text(found.text)
        chat = RenderedChat.of(inner, tools, found)
        problem = lost(chat, messages)
        if problem is not None:
            roles = [message["role"] for message in messages]
            instead = "; give it the role system" if "developer" in roles else ""
            raise DataError(
                f"the chat template does not render everything: {problem}. Remove it{instead}, or "
                "use a template that renders it"
            )
        return chat

    def _sample(self, prepared: _Prepared, tokens: Tokens) -> Made:
        given, chat, _ = prepared
        answers = self._finder.answers(chat, tokens, given)
        i = lost_reasoning(chat, given)
        if i is not None:
            raise DataError(
                f"the chat template drops the reasoning of message {i}, which is trained. Remove "
                f"it, or use a template that renders it{self._advice(given, chat.tools)}"
            )
        ends = None if self._merge_context else self._finder.ends(chat, tokens, answers)
        size = len(tokens.ids)
        mask = torch.zeros(size, dtype=torch.bool)
        unstopped = rewritten = 0
        for answer in answers:
            if is_trained(given[answer.message]) and answer.trained:
                mask[list(answer.trained)] = True
                unstopped += not tokens.is_control(answer.trained[-1])
                rewritten += not answer.as_at_use
        stops = [edge for answer in answers for edge in (answer.start, answer.end)]
        sample = {
            "input_ids": torch.tensor(tokens.ids, dtype=torch.int64),
            "turn_ids": _turn_ids(size, stops if ends is None else ends),
            "answer_mask": mask,
        }
        if any(message.get("evidence") for message in given):

            def render(messages: Sequence[Message]) -> str:
                return self._renderer.text(prepared.form.messages(messages), chat.tools)

            found = needles(given, chat.found.text, tokens, render)
            sample["needle_mask"] = torch.tensor(found, dtype=torch.bool)
        return Made(sample, unstopped, rewritten)


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


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the rendered chat holds {text[error.start]!a}, half of a surrogate pair: look for it "
            "in the tool calls and the parts of the content"
        ) from error


def _turn_ids(size: int, stops: list[int]) -> Tensor:
    """Return for each token how many edges of turns stand at or before it."""
    edges = torch.tensor(stops, dtype=torch.int64)
    return torch.bucketize(torch.arange(size), edges, right=True)
