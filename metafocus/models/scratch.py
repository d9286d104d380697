"""A small model with random weights, made from scratch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from metafocus.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def small(
    texts: Iterable[str],
    *,
    vocab_size: int = 2048,
    hidden_size: int = 128,
    num_hidden_layers: int = 4,
    max_length: int = 512,
    attn_implementation: str = "sdpa",
) -> tuple[PreTrainedModel, Any]:
    """Make a small Qwen2 with random weights, and a tokenizer trained on some texts.

    It has grouped-query attention and tied embeddings. Its weights are drawn from torch's global
    generator: call `torch.manual_seed` first.

    Args:
        texts: what the tokenizer learns its merges from.
        vocab_size: the largest number of tokens, at least 259.
        hidden_size: the width, a multiple of 64.
        num_hidden_layers: how many layers.
        max_length: the longest sequence that it must take.
        attn_implementation: as transformers names it.

    Returns:
        The model and its tokenizer, the same that `load` finds once both are saved.

    Raises:
        DataError: for sizes that do not fit, or no text at all.

    Example:
        >>> model, tokenizer = small(["the cat sat on the mat"], vocab_size=300, hidden_size=64,
        ...     num_hidden_layers=1)
        >>> model.config.hidden_size, tokenizer.pad_token
        (64, '<|endoftext|>')
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from metafocus.data.tokenizer import train_tokenizer

    if hidden_size < 64 or hidden_size % 64:
        raise DataError(f"hidden_size={hidden_size} must be a multiple of 64.")
    if num_hidden_layers < 1:
        raise DataError(f"num_hidden_layers={num_hidden_layers} must be at least 1.")
    tokenizer: Any = train_tokenizer(texts, vocab_size=vocab_size)
    heads = hidden_size // 32
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=max(max_length, 128),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation(attn_implementation)
    return model, _as_loaded(tokenizer, config)


def _as_loaded(tokenizer: Any, config: Any) -> Any:
    """Return the tokenizer that `AutoTokenizer` finds beside the saved model.

    Beside a Qwen2 it splits words as Qwen2 does, whatever was saved, so training must use it too.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        try:
            tokenizer.save_pretrained(directory)
            config.save_pretrained(directory)
        except Exception as error:
            # tokenizers raises bare exceptions, for a full disk too.
            raise DataError(
                f"the temporary directory {directory} could not be written to: {error}. Make "
                "room, or name another with TMPDIR."
            ) from error
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
