"""Whether a Hugging Face model computes the same on shares of a sequence as on the whole."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metafocus.calls import evaluating
from metafocus.errors import ProblemError
from metafocus.lm.hf import heads
from metafocus.lm.hf.attention import own_mask, takes_spans
from metafocus.lm.hf.inputs import model_inputs
from metafocus.lm.hf.side_runs import side_run
from metafocus.masks.spans import Spans
from metafocus.parallel.sequence import share, size_of
from metafocus.sharding import HOOKED, sharding_of

_CHECKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_shared_sequence(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Raise, on every rank, for a model whose sequences cannot be shared; checked once a model.

    A few tokens are run as a whole and in shares: their final hidden states must be the same.

    Args:
        model: a Hugging Face causal language model.
        group: the ranks that share a sequence.

    Raises:
        ProblemError: if the model takes no spans, or mixes tokens outside of its attention.
    """
    if model in _CHECKED:
        return
    name = type(model).__name__
    if own_mask(model) is not None or not takes_spans(model):
        why = own_mask(model) or (
            'its attention takes no spans. Load it with attn_implementation="metafocus_ulysses" '
            "and without attention dropout"
        )
        raise ProblemError(f"{name} cannot share sequences among ranks: {why}.")
    if sharding_of(model) & HOOKED:
        raise ProblemError(
            f"{name} is sharded, and its shards are reduced as if each rank had data of its own: "
            "with shared sequences the gradient would have another length. Use DDP, no wrapper, or "
            "metafocus.trainer.distributed.parametrise(model, mesh) (--sharding parametrised)."
        )
    with side_run(model), evaluating(model):
        whole = _final_hidden(model, None, size_of(group))
        reason = None
        try:
            parts = _final_hidden(model, group, size_of(group))
        except TypeError as error:
            reason = f"it takes no sequence_group ({error})"
            parts = whole
    expected = share(whole.mT, group, 0).mT if reason is None else whole
    # Kernels add in another order for other shapes.
    eps = 64 * torch.finfo(whole.dtype).eps
    differs = (parts - expected).abs().amax() > eps * whole.abs().amax()
    differs = differs.to(torch.int32)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=group)
    if bool(differs):
        reason = "a few tokens come out in shares otherwise than as a whole"
    if reason is not None:
        raise ProblemError(
            f"{name} cannot share sequences among ranks: {reason}. Models whose tokens meet in "
            "attention alone, with position_ids, can: Qwen, Llama, Mistral, Gemma."
        )
    _CHECKED.add(model)


def _final_hidden(model: nn.Module, group: dist.ProcessGroup | None, ranks: int) -> Tensor:
    """Return the final hidden states of two tokens for each rank, `[1, S, D]`."""
    size = model.config.get_text_config().vocab_size  # pyright: ignore
    index = torch.arange(2 * ranks, device=next(model.parameters()).device)[None]
    inputs = model_inputs(
        model, (index + size // 2) % size, index, Spans(torch.zeros_like(index), index + 1), group
    )
    return heads.read_hidden(
        heads.output_head(model), lambda: model(**inputs), lambda head, hidden: hidden
    )
