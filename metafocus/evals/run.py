"""Greedy answers of a model to many prompts, in batches that are padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from metafocus.checks import whole
from metafocus.errors import DataError
from metafocus.evals.items import Count, Item
from metafocus.rng import kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# These replace the generation settings of a checkpoint.
_PLAIN: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def prompt_text(item: Item, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat with one user message, the header of the answer, and its first words.

    Raises:
        DataError: if the tokenizer has no chat template.
    """
    return _rendered(item.prompt, tokenizer) + item.answer_prefix


def prompt_counter(tokenizer: PreTrainedTokenizerBase) -> Count:
    """Return a function that counts the tokens of a prompt, including the chat template."""
    return lambda text: len(_encode(_rendered(text, tokenizer), tokenizer))


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Return the model's greedy continuation of each prompt, in the order of the items.

    There is no sampling, no beam search and no repetition penalty; the generation settings of the
    checkpoint are not used. A batch has items with the same number of new tokens, with the longest
    prompts first, padded on the left.

    Args:
        model: a causal language model. It runs in evaluation mode, and its mode is restored.
        tokenizer: its tokenizer, with a chat template.
        items: the questions.
        batch_size: the number of prompts in a batch.
        progress: called with the number of answers after each batch.

    Raises:
        DataError: if the batch size is below 1, if there is no token for padding, or if there is no
            chat template.
    """
    whole("batch_size", batch_size, 1, error=DataError)
    pad: Any = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    if pad is None:
        raise DataError("the tokenizer has no pad_token and no eos_token: set tokenizer.pad_token")
    ids = [_encode(prompt_text(item, tokenizer), tokenizer) for item in items]
    order = sorted(range(len(items)), key=lambda i: (items[i].new_tokens, -len(ids[i])))
    ends = _ends(model, tokenizer)
    found: dict[int, str] = {}
    training = model.training
    model.eval()
    try:
        while len(found) < len(items):
            rest = order[len(found) : len(found) + batch_size]
            new = items[rest[0]].new_tokens
            chosen = [i for i in rest if items[i].new_tokens == new]
            outputs = _generate(model, [ids[i] for i in chosen], new, pad, ends)
            for i, output in zip(chosen, outputs, strict=True):
                found[i] = tokenizer.decode(output, skip_special_tokens=True)  # pyright: ignore
            if progress is not None:
                progress(len(chosen))
    finally:
        model.train(training)
    return [found[i] for i in range(len(items))]


@torch.inference_mode()
def _generate(
    model: PreTrainedModel, rows: list[list[int]], new: int, pad: int, ends: list[int]
) -> list[list[int]]:
    width = max(len(row) for row in rows)
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    batch = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    # By length, not by token, because prompts may contain the padding token.
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    output = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=batch,
        attention_mask=mask,
        max_new_tokens=new,
        **_PLAIN,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
        eos_token_id=ends or None,
    )
    return [_until(row, ends) for row in output[:, width:].tolist()]


def _until(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end tokens of the tokenizer and of the checkpoint, which may differ."""
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({i for i in [*own, tokenizer.eos_token_id] if isinstance(i, int)})


def _rendered(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template: set tokenizer.chat_template")
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return str(found)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # The template already contains the special tokens.
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    new: int,
    temperature: float,
    *,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Return one continuation of a prompt, greedy if the temperature is 0.

    It depends only on the arguments: neither on the checkpoint's generation settings nor on the
    global random state, which does not change.
    """
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    ends, own = _ends(model, tokenizer), {"do_sample": False, "temperature": None, "top_p": None}
    if temperature > 0:
        own = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    batch = torch.tensor([list(ids)], device=device)
    with torch.inference_mode(), kept([batch]):
        torch.manual_seed(seed)
        output = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new,
            **_PLAIN,
            **own,
            top_k=0 if temperature > 0 else None,
            pad_token_id=ends[0] if ends else 0,
            eos_token_id=ends or None,
        )
    return str(
        tokenizer.decode(_until(output[0, len(ids) :].tolist(), ends), skip_special_tokens=True)
    )
