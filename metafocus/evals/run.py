"""Answers of a model to many prompts, greedy and in batches that are padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from metafocus.calls import changed, evaluating
from metafocus.checks import whole
from metafocus.errors import DataError
from metafocus.evals.items import Count, Item
from metafocus.evals.positions import check_positions, positions
from metafocus.evals.prompts import chat_text, prefix_text, said
from metafocus.evals.prompts import encode as _encode
from metafocus.evals.thinking import CLOSE
from metafocus.lm.generation import prefilled
from metafocus.masks import Batch, MaskPolicy
from metafocus.rng import kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CLOSED = f"\n{CLOSE}\n\n"


def prompt_text(item: Item, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat with one user message, the header of the answer, and its first words."""
    return _chat(item.prompt, tokenizer) + prefix_text(item, tokenizer)


def prompt_counter(tokenizer: PreTrainedTokenizerBase) -> Count:
    """Return a function that counts the tokens of a prompt, including the chat template."""
    return lambda text: len(_encode(_chat(text, tokenizer), tokenizer))


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    batch_size: int = 8,
    thinking: int = 0,
    max_positions: int | None = None,
    mask: MaskPolicy | None = None,
    each: Callable[[Mapping[int, str]], None] | None = None,
) -> list[str]:
    """Return the model's greedy continuation of each prompt, in the order of the items.

    There is no sampling, no beam search and no penalty; the generation settings of the checkpoint
    are not used. A batch has items with the same number of new tokens, with the longest prompts
    first, padded on the left. Reasoning is not part of an answer.

    Args:
        model: a causal language model. It runs in evaluation mode, and its mode is restored.
        tokenizer: its tokenizer. Without a chat template, chats are written in a plain form.
        items: the questions.
        batch_size: the number of prompts in a batch.
        thinking: the largest number of tokens of reasoning before an answer; 0 for none.
        max_positions: the positions of the model, if its configuration does not say them.
        mask: which keys a token of a question sees, such as `masks.context_bidirectional`; answers
            are causal in any case. Default: all are causal, as in a server.
        each: called after each batch with the answers by the number of their item.

    Raises:
        DataError: if the batch size is below 1, if there is no token for padding, if a prompt is
            too long for the model, or if a model that has no token `</think>` should think.
    """
    whole("batch_size", batch_size, 1, error=DataError)
    pad: Any = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    if pad is None:
        raise DataError("the tokenizer has no pad_token and no eos_token: set tokenizer.pad_token")
    most = max_positions or positions(model.config)
    ids, tails = prompt_tokens(tokenizer, items, thinking)
    for item, row, tail in zip(items, ids, tails, strict=True):
        size = len(row) + thinking + len(tail) + item.new_tokens
        check_positions(size, most, f"a prompt of {item.suite} {item.task}")
    order = sorted(range(len(items)), key=lambda i: (items[i].new_tokens, -len(ids[i])))
    ends = end_tokens(model, tokenizer)
    found: dict[int, str] = {}
    with evaluating(model):
        while len(found) < len(items):
            rest = order[len(found) : len(found) + batch_size]
            new = items[rest[0]].new_tokens
            chosen = [i for i in rest if items[i].new_tokens == new]
            rows = [ids[i] for i in chosen]
            reading = None
            if mask is not None:
                reading = Reading(mask, [_question(items[i], tokenizer, ids[i]) for i in chosen])
            if thinking:
                stop = [*ends, think_end(tokenizer)]
                thoughts = _generate(model, rows, thinking, pad, stop, reading=reading)
                rows = [a + b + tails[i] for i, a, b in zip(chosen, rows, thoughts, strict=True)]
            outputs = _generate(model, rows, new, pad, ends, reading=reading)
            texts = {i: said(row, tokenizer) for i, row in zip(chosen, outputs, strict=True)}
            found |= texts
            if each is not None:
                each(texts)
    return [found[i] for i in range(len(items))]


class Reading(NamedTuple):
    """How prompts are read: the mask policy, and how many first tokens of each are the question."""

    mask: MaskPolicy
    questions: list[int]

    def turns(self, real: Tensor) -> Batch:
        """Return what a mask policy needs: the question is one turn, what follows is an answer."""
        index = real.cumsum(-1) - 1
        answer = index >= torch.tensor(self.questions, device=real.device)[:, None]
        return {
            "turn_ids": torch.where(real != 0, answer.long(), -1),
            "answer_mask": answer & (real != 0),
        }


def _question(item: Item, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Return how many tokens of a prompt come before the first words of its answer."""
    alone = _encode(_chat(item.prompt, tokenizer), tokenizer)
    same = [a == b for a, b in zip(alone, ids, strict=False)]
    return same.index(False) if False in same else len(same)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], thinking: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of each prompt, and those that follow the reasoning of each answer."""
    if not thinking:
        texts = [prompt_text(item, tokenizer) for item in items]
        return [_encode(text, tokenizer) for text in texts], [[] for _ in items]
    chats = [[{"role": "user", "content": item.prompt}] for item in items]
    texts = [chat_text(chat, tokenizer, thinking=True) for chat in chats]
    tails = [_CLOSED + prefix_text(item, tokenizer) for item in items]
    return [_encode(text, tokenizer) for text in texts], [
        tokenizer.encode(tail, add_special_tokens=False) for tail in tails
    ]


def think_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends reasoning.

    Raises:
        DataError: if the tokenizer has no such token.
    """
    token = tokenizer.get_vocab().get(CLOSE)
    if token is None:
        raise DataError(f"the tokenizer has no token {CLOSE}: this model has no thinking mode")
    return token


def closed_thoughts(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end reasoning and begin an answer."""
    return tokenizer.encode(_CLOSED, add_special_tokens=False)


def own_settings(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Hide the generation settings of a checkpoint.

    `generate` takes from them whatever the settings that it is given leave open.
    """
    from transformers import GenerationConfig

    return changed((model, "generation_config", GenerationConfig()))


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    rows: list[list[int]],
    new: int,
    pad: int,
    ends: list[int],
    sampling: Mapping[str, Any] | None = None,
    reading: Reading | None = None,
) -> list[list[int]]:
    """Return the new tokens of each row, up to its end; greedy without settings of sampling."""
    from transformers import GenerationConfig

    width = max(len(row) for row in rows)
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    batch = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    # By length, not by token, because prompts may contain the padding token.
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    settings = GenerationConfig(
        max_new_tokens=new,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=ends or None,
        **({"do_sample": False} if sampling is None else sampling),
    )
    inputs = {"input_ids": batch, "attention_mask": mask}
    if reading is not None:
        inputs = prefilled(model, {**inputs, **reading.turns(mask)}, reading.mask)
    with own_settings(model):
        output = model.generate(  # pyright: ignore[reportCallIssue]
            **inputs, generation_config=settings
        )
    return [_until(row, ends) for row in output[:, width:].tolist()]


def _until(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end tokens of the tokenizer and of the checkpoint, which may differ."""
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({i for i in [*own, tokenizer.eos_token_id] if isinstance(i, int)})


def sample_tokens(
    model: PreTrainedModel,
    ids: Sequence[int],
    new: int,
    temperature: float,
    *,
    ends: Sequence[int],
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """Return the tokens of one continuation of a prompt, up to one of the end tokens.

    They depend only on the arguments: neither on the checkpoint's generation settings nor on the
    global random state, which does not change.
    """
    embeddings: Any = model.get_input_embeddings()
    own = None
    if temperature > 0:
        own = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with kept([embeddings.weight]):
        torch.manual_seed(seed)
        return _generate(model, [list(ids)], new, ends[0] if ends else 0, list(ends), own)[0]


def _chat(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return chat_text([{"role": "user", "content": text}], tokenizer)
