"""What a language-model loss is made of and is given, checked before a model runs on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafocus.errors import DataError, ProblemError
from metafocus.masks.rows import refuse
from metafocus.masks.spans import Spans


def check_parts(model: nn.Module, adapter: Any, mask: Any, tokens: Any) -> None:
    """Raise for arguments of `lm_loss` that are no model, adapter, mask or token policy.

    Raises:
        ProblemError: naming the argument, what it is and an example of what it should be.
    """
    if not hasattr(model, "config") or not hasattr(model.config, "get_text_config"):
        raise ProblemError(
            f"model must be a Hugging Face model, got {type(model).__name__} without a config."
        )
    if isinstance(adapter, type) or not (hasattr(adapter, "init") and hasattr(adapter, "bind")):
        raise ProblemError(
            f"adapter must be an adapter such as mf.LoRA(mf.all_linear), got {adapter!r}."
        )
    for name, policy, example in (
        ("mask", mask, "mf.masks.context_bidirectional"),
        ("tokens", tokens, "mf.answer_tokens"),
    ):
        if not callable(policy):
            raise ProblemError(
                f"{name} must be a function of the batch such as {example}, got {policy!r}."
            )


def check_spans(spans: Any) -> Spans:
    """Return what a mask policy returned, if it is spans.

    Raises:
        ProblemError: if it is something else.
    """
    if not isinstance(spans, Spans):
        raise ProblemError(
            "a mask policy returns mf.Spans, one interval of keys per query; this one returned "
            f"{type(spans).__name__}."
        )
    return spans


def check_ids(model: nn.Module, ids: Tensor) -> None:
    """Raise for tokens that the model has no embeddings for; on CUDA torch itself stops them.

    Raises:
        DataError: if there are no tokens, or they are no token ids of this model.

    Example:
        >>> check_ids(nn.Linear(2, 2), torch.zeros(1, 3))
        Traceback (most recent call last):
        metafocus.errors.DataError: input_ids are torch.float32: token ids are integers.
    """
    if ids.numel() == 0:
        raise DataError(f"the batch is empty: input_ids has shape {list(ids.shape)}.")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise DataError(f"input_ids are {ids.dtype}: token ids are integers.")
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows is not None and not ids.is_cuda:
        refuse(
            ((ids < 0) | (ids >= rows)).any(-1),
            f"input_ids has tokens outside of 0 to {rows - 1}, the embeddings of the model; encode "
            "with the model's own tokenizer (-100 belongs into labels only)",
        )
