"""What a Hugging Face model is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafocus.errors import DataError
from metafocus.lm.hf.attention import attention_mask
from metafocus.masks.entries import refuse
from metafocus.masks.spans import Spans
from metafocus.parallel.collectives import Group
from metafocus.parallel.sequence import share, whole_length


def model_inputs(
    model: nn.Module, ids: Tensor, positions: Tensor, spans: Spans, group: Group = None
) -> dict[str, Any]:
    """Return the keywords of a call: tokens, positions and the mask that the model takes.

    If several ranks share the sequence, tokens and positions are those of this rank, and the mask
    is that of the whole sequence.

    Args:
        model: a Hugging Face causal language model.
        ids: tokens, `[B, S]`.
        positions: the position of each token in its document, `[B, S]`.
        spans: the keys that each query may see.
        group: the ranks that share the sequence.
    """
    spans = Spans(*(whole_length(x, group, 0) for x in spans))
    shared = {} if group is None else {"sequence_group": group}
    return {
        # Padding at the end sees nothing, and nothing sees it.
        "input_ids": share(ids, group, 0),
        "position_ids": share(positions, group, 0),
        "attention_mask": attention_mask(model, spans),
        "use_cache": False,
        **shared,
    }


def own_inputs(ids: Tensor, present: Tensor | None) -> dict[str, Any]:
    """Return the keywords of a call of a model that makes its causal mask itself.

    Args:
        ids: tokens, `[B, S]`.
        present: 1 on tokens and 0 on padding, `[B, S]`; None: there is no padding.
    """
    present = torch.ones_like(ids) if present is None else present
    return {"input_ids": ids, "attention_mask": present, "use_cache": False}


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
