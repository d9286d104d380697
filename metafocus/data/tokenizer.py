"""Trains a small tokenizer: byte-level BPE with a ChatML chat template."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Every byte is a token, so no text is unknown. A vocabulary holds at least these and the special
# tokens.
_BYTES = 256

CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- 'You may call these functions:' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\nA call is <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{{- '<tool_call>' + ({'name': function.name, 'arguments': function.arguments} | tojson) }}
{{- '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    r"""Train a byte-level BPE tokenizer with a ChatML template that marks the assistant's tokens.

    The template knows the roles system, developer, user, assistant and tool, accepts `tools`, and
    puts `{% generation %}` around an answer and its `<|im_end|>`. The padding token is
    `<|endoftext|>`. A turn and a sequence end with `<|im_end|>`. The same texts give the same
    tokenizer.

    Args:
        texts: the strings that merges are learned from; they are read once, one after another.
        vocab_size: the largest number of tokens, including special ones. There are fewer if the
            texts do not give enough merges.

    Raises:
        DataError: if there is no text, if `texts` is a single string, or if the vocabulary is
            below 259.

    Example:
        >>> from metafocus.data.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, vocab_size=300)
        >>> chat = [{"role": "user", "content": "the cat?"}]
        >>> tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        '<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    floor = _BYTES + len(SPECIAL_TOKENS)
    if vocab_size < floor:
        raise DataError(
            f"vocab_size={vocab_size} is below {floor} (256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens): pass vocab_size >= {floor}"
        )
    if isinstance(texts, str):
        raise DataError("texts is a single string: pass an iterable of strings, such as [text]")
    found = _nonempty(texts)
    first = next(found, None)
    if first is None:
        raise DataError("texts holds no text: pass at least one non-empty string")

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(itertools.chain([first], found), trainer=trainer)
    end_of_text, start, end = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=end_of_text,
        eos_token=end,
        additional_special_tokens=[start],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts that are not empty; refuse what is no text."""
    for text in texts:
        if not text:
            continue
        if not isinstance(text, str):
            raise DataError(
                f"texts holds {text!r:.80} of type {type(text).__name__}: pass strings only"
            )
        yield text
