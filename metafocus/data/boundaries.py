"""Finds where each message of a rendered chat begins and ends, in tokens.

A boundary is found in the rendered text and mapped to tokens by the tokenizer's own offsets. For
this, the text of the first messages must be the beginning of the text of the whole chat.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

from metafocus.data.messages import Message
from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys for metafocus, which the chat template must not see.
_OWN_KEYS = ("weight", "evidence")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the same test as in transformers
_PRIVATE_USE = range(0xE000, 0xF900)


class RewrittenError(DataError):
    """A boundary cannot be found: the first messages are rendered differently in the whole chat."""


@dataclass(frozen=True)
class RenderedChat:
    """A rendered chat, the input of all later steps."""

    messages: Sequence[Message]
    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] | None
    text: str
    ids: list[int]
    marks: list[bool] | None  # [S], None if the template marks nothing
    offsets: list[tuple[int, int]] | None  # [S], None for a tokenizer without offsets

    def tokens_before(self, prefix: str) -> int:
        """Return the number of tokens inside `prefix`; a token across its end does not count."""
        if self.offsets is not None:
            return bisect_right(self.offsets, len(prefix), key=lambda offset: offset[1])
        ids = _tokenize(self.tokenizer, prefix)["input_ids"]
        if ids != self.ids[: len(ids)]:
            raise RewrittenError(
                "the tokenizer merges tokens across the beginning or the end of an answer: use "
                "its fast version, which knows the characters of each token"
            )
        return len(ids)


def render_text(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: list[Any] | None,
    prompt: bool = False,
) -> str:
    """Return the text that the tokenizer's template makes of a chat."""
    text = tokenizer.apply_chat_template(
        _plain(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
    )
    return cast(str, text)


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k not in _OWN_KEYS} for m in messages]


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Any:
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)


def _template_errors() -> tuple[type[Exception], ...]:
    import jinja2

    # Templates raise the first on purpose, and the second if they add a string to a list.
    # transformers raises the third for tools that it cannot describe.
    return jinja2.TemplateError, TypeError, ValueError


def render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None
) -> RenderedChat:
    """Render and tokenise a chat once.

    Raises:
        DataError: if there is no chat template, if the template refuses the chat, or if it does
            not render the same text twice.
    """
    if not hasattr(tokenizer, "apply_chat_template"):
        raise DataError(
            f"tokenizer is a {type(tokenizer).__name__}: pass a Hugging Face tokenizer, such as "
            "AutoTokenizer.from_pretrained(name)"
        )
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template: load the tokenizer of the chat model, or set "
            "tokenizer.chat_template (metafocus.data.tokenizer.CHATML is one)"
        )
    tool_list = list(tools) if tools else None
    try:
        text = render_text(messages, tokenizer, tool_list)
    except _template_errors() as error:
        raise DataError(
            f"the chat template refuses these messages ({error}): change the order or the roles "
            f"({', '.join(m['role'] for m in messages)}) to what the template accepts"
        ) from error

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the rendered chat holds {text[error.start]!a}, half of a surrogate pair: look for it "
            "in the tool calls and the parts of the content"
        ) from error
    template = tokenizer.get_chat_template(tools=cast(Any, tool_list))
    marked = bool(tokenizer.is_fast) and _GENERATION.search(template) is not None
    encoded = cast(
        Mapping[str, Any],
        tokenizer.apply_chat_template(
            _plain(messages),
            tools=tool_list,
            return_dict=True,
            return_assistant_tokens_mask=marked,
            tokenizer_kwargs={"verbose": False},
        ),
    )
    ids = list(encoded["input_ids"])
    offsets, marks = None, None
    if tokenizer.is_fast:
        again = _tokenize(tokenizer, text, return_offsets_mapping=True)
        if again["input_ids"] != ids:
            raise DataError(
                "tokenising the rendered chat again gives other ids, so characters cannot be "
                "traced to tokens: use a template that renders the same text every time and the "
                "tokenizer's own apply_chat_template"
            )
        offsets = again["offset_mapping"]
        if marked:
            marks = _whole_characters(encoded["assistant_masks"], again["offset_mapping"])
    return RenderedChat(messages, tokenizer, tool_list, text, ids, marks, offsets)


def _whole_characters(marks: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[bool]:
    # transformers marks only the first token of the last character, but an emoji has several.
    whole: list[bool] = []
    for i, mark in enumerate(marks):
        shared = i > 0 and offsets[i][0] < offsets[i - 1][1]
        whole.append(bool(mark) or (shared and whole[-1]))
    return whole


def _beginning(chat: RenderedChat, count: int, prompt: bool, index: int) -> str:
    """Return the text of the first `count` messages; the whole text must begin with it."""
    try:
        text = render_text(chat.messages[:count], chat.tokenizer, chat.tools, prompt)
    except _template_errors() as error:
        raise _rewritten(index, f"the template refuses the first {count} alone: {error}") from error
    if not chat.text.startswith(text):
        # Some templates add the eos token at the end of a chat, but not after earlier messages.
        text = text.removesuffix(cast(str, chat.tokenizer.eos_token or ""))
    if not chat.text.startswith(text):
        raise _rewritten(
            index,
            f"the text of the first {count} messages{' and the generation prompt' * prompt} is "
            "not the beginning of the text of the whole chat",
        )
    return text


def _rewritten(index: int, reason: str) -> RewrittenError:
    return RewrittenError(
        f"the chat template rewrites history, so message {index} cannot be located: {reason}. "
        "Mark the answers in the template with {% generation %}, use a template that renders a "
        "message the same wherever it stands, or split the chat so that only its last message is "
        "an answer"
    )


def _prompt(chat: RenderedChat, index: int) -> str:
    """Return the text before the content of assistant message `index`, with its header."""
    if index > 0:
        prompt = _beginning(chat, index, True, index)
        if prompt != render_text(chat.messages[:index], chat.tokenizer, chat.tools):
            return prompt
    # Either there is no earlier message, or the template ignores add_generation_prompt. A
    # placeholder for the answer then shows where the content begins, after the header.
    standin = unused_character(chat.text)
    trial = [*chat.messages[:index], {"role": "assistant", "content": standin}]
    try:
        prompt, found, _ = render_text(trial, chat.tokenizer, chat.tools).partition(standin)
    except _template_errors() as error:
        raise _rewritten(index, f"the template refuses another answer there: {error}") from error
    if not found or not chat.text.startswith(prompt):
        raise _rewritten(index, "its header depends on its content")
    return prompt


def unused_character(text: str) -> str:
    """Return a private-use character that `text` does not hold, to find it after rendering."""
    return next(chr(code) for code in _PRIVATE_USE if chr(code) not in text)


def assistant_spans(chat: RenderedChat) -> list[tuple[int, int]]:
    """Return the token span [start, stop) of each assistant message, without its header.

    Raises:
        RewrittenError: if the whole text does not begin with the text of the first messages.
    """
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            prompt, whole = _prompt(chat, i), _beginning(chat, i + 1, False, i)
            if not whole.startswith(prompt):
                raise _rewritten(i, "the message does not begin with the generation prompt")
            start, stop = chat.tokens_before(prompt), chat.tokens_before(whole)
            if spans and start < spans[-1][1]:
                raise _rewritten(i, "it is rendered before the end of an earlier answer")
            spans.append((start, stop))
    return spans


def message_ends(chat: RenderedChat) -> list[int]:
    """Return the number of tokens up to the end of each message.

    Raises:
        DataError: if the template joins messages, so that their boundary cannot be found.
    """
    try:
        texts = [_beginning(chat, i + 1, False, i) for i in range(len(chat.messages))]
    except RewrittenError as error:
        raise DataError(f"{error}; or pass merge_context=True") from error
    return [chat.tokens_before(text) for text in texts]


def spans_from_marks(
    chat: RenderedChat, merge_context: bool, error: RewrittenError
) -> list[tuple[int, int]]:
    """Return the runs of the generation marks, if each belongs to one assistant message.

    Raises:
        RewrittenError: `error` itself, if the template marks nothing.
        DataError: if the number of runs differs from that of the assistant messages, or if
            `merge_context` is off.
    """
    if chat.marks is None:
        raise error
    if not merge_context:
        raise DataError(f"{error}; or pass merge_context=True") from error
    runs, position = [], 0
    for marked, run in groupby(chat.marks):
        start, position = position, position + len(list(run))
        if marked:
            # The newline after an end-of-turn token belongs to the message before it.
            runs.append((start, position + _leading_space(chat, position)))
    expected = sum(message["role"] == "assistant" for message in chat.messages)
    if len(runs) != expected:
        raise DataError(
            f"{error}. Its generation marks do not help: {len(runs)} marked runs for {expected} "
            "assistant messages"
        ) from error
    return runs


def _leading_space(chat: RenderedChat, start: int) -> int:
    """Return the number of tokens from `start` on that are only white space."""
    count = 0
    while start + count < len(chat.ids) and is_space(chat, start + count, start + count + 1):
        count += 1
    return count


def is_space(chat: RenderedChat, start: int, stop: int) -> bool:
    """Return whether the tokens [start, stop) are only white space."""
    return not cast(str, chat.tokenizer.decode(chat.ids[start:stop])).strip()
