"""The text that a model continues: its chat template, or a plain form where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metafocus.evals.items import Item
from metafocus.evals.thinking import CLOSE, OPEN, split_thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURNS = {"system": "System", "user": "User", "assistant": "Assistant"}
_NEXT = "\nUser:"


def chat_text(
    messages: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    thinking: bool = False,
) -> str:
    r"""Return a chat up to the header of the next answer.

    A base model has no chat template. Its chat is written as `User: ...`, `Assistant: ...`, with an
    empty line between turns. Templates of thinking models learn from `enable_thinking` whether to
    think. If a template opens `<think>` all the same, it is closed here, and if it does not open
    it where it should, it is opened.

    Example:
        >>> from metafocus.data.tokenizer import train_tokenizer
        >>> from metafocus.evals.prompts import chat_text
        >>> tokenizer = train_tokenizer(["a text"])
        >>> tokenizer.chat_template = None
        >>> chat_text([{"role": "user", "content": "Why?"}], tokenizer)
        'User: Why?\n\nAssistant:'
    """
    if tokenizer.chat_template is None:
        turns = [f"{_TURNS[m['role']]}: {m['content']}" for m in messages]
        text = "\n\n".join([*turns, "Assistant:"])
    else:
        chat: Any = list(messages)
        text = str(
            tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
        )
    opened = text.rstrip().endswith(OPEN)
    if thinking:
        return text if opened else f"{text}{OPEN}\n"
    return f"{text.rstrip()}\n{CLOSE}\n\n" if opened else text


def prefix_text(item: Item, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the first words of an answer, as they follow the header of the answer."""
    plain = tokenizer.chat_template is None and item.answer_prefix
    return f" {item.answer_prefix}" if plain else item.answer_prefix


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text from `chat_text`, with a first token that only plain texts lack.

    A template already contains the special tokens. For a base model the tokenizer adds them.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if tokenizer.chat_template is not None:
        return ids
    first = tokenizer.encode("")[:1]  # it may also be the token of the end
    return [*first, *ids] if first == [tokenizer.bos_token_id] else ids


def answer_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return generated tokens as text: no special tokens, except the one that opens a tool call."""
    tag = tokenizer.get_vocab().get("<|python_tag|>")
    special = set(tokenizer.all_special_ids) - {tag}
    text = str(tokenizer.decode([i for i in ids if i not in special]))
    # A base model goes on with the next question.
    return text.partition(_NEXT)[0] if tokenizer.chat_template is None else text


def said(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return generated tokens as text without reasoning."""
    return split_thoughts(answer_text(ids, tokenizer))[1]
