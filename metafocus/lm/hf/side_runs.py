"""Forward passes of a few tokens that show what a model does, and leave no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from metafocus.calls import using
from metafocus.lm.hf.attention import attending, own_mask
from metafocus.lm.hf.checkpointing import exact_checkpointing
from metafocus.lm.hf.inputs import model_inputs, own_inputs
from metafocus.masks.spans import Spans
from metafocus.rng import kept
from metafocus.torch_internals import outside_transforms


@contextlib.contextmanager
def side_run(model: nn.Module) -> Iterator[None]:
    """Run a model on the side inside a `with` block, with the attention that the loss uses.

    No transform is active and no graph is built; the random state is as before afterwards.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(using(model))
        stack.enter_context(outside_transforms())
        stack.enter_context(kept(model.parameters()))
        stack.enter_context(torch.no_grad())
        stack.enter_context(exact_checkpointing(model))
        stack.enter_context(attending(model))
        yield


def few_tokens(model: nn.Module, rows: int = 1, length: int = 2) -> dict[str, Any]:
    """Return the inputs of a model for a few tokens under its causal mask."""
    place = torch.arange(length, device=next(model.parameters()).device).expand(rows, -1)
    number = model.config.get_text_config().vocab_size  # pyright: ignore
    # The first ids are avoided, because the embedding of a padding token is zero.
    other = torch.arange(rows, device=place.device)[:, None] * length + place
    ids = number // 2 + other % max(number - number // 2, 1)
    if own_mask(model) is not None:
        return own_inputs(ids, None)
    return model_inputs(model, ids, place, Spans(torch.zeros_like(place), place + 1))
