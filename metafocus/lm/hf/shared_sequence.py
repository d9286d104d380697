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
from metafocus.parallel.fsdp2 import averages_over_groups
from metafocus.parallel.sequence import share, size_of
from metafocus.sharding import Sharding, sharding_of

_CHECKED: weakref.WeakKeyDictionary[nn.Module, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def check_shared_sequence(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Raise, on every rank, for a model whose sequences cannot be shared; checked once a model.

    A few tokens are run as a whole and in shares: their final hidden states must be the same.

    Raises:
        ProblemError: if the model takes no spans, or mixes tokens outside of its attention.
    """
    if _CHECKED.get(model) is group:
        return
    name = type(model).__name__
    if own_mask(model) is not None or not takes_spans(model):
        why = own_mask(model) or (
            'its attention takes no spans. Load it with attn_implementation="metafocus_ulysses" '
            "and without attention dropout"
        )
        raise ProblemError(f"{name} cannot share sequences among ranks: {why}.")
    _check_sharding(model, name, group)
    with side_run(model), evaluating(model):
        whole = _final_hidden(model, None, size_of(group))
        reason = None
        try:
            parts = _final_hidden(model, group, size_of(group))
        except TypeError as error:
            reason = f"it takes no sequence_group ({error})"
            parts = whole
    expected = share(whole.mT, group, 0).mT if reason is None else whole
    # For other shapes, kernels add in another order.
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
    _CHECKED[model] = group


def _check_sharding(model: nn.Module, name: str, group: dist.ProcessGroup) -> None:
    """Raise for shards whose gradients are reduced as if every rank had data of its own."""
    found = sharding_of(model)
    if found & (Sharding.TP | Sharding.DTENSOR):
        raise ProblemError(
            f"{name} has DTensor weights (tp_plan, or sharded by hand), which are not reduced over "
            "ranks that share a sequence. Use DDP, fully_shard, or "
            "metafocus.trainer.distributed.parametrise(model, mesh, sequence_group=group)."
        )
    if Sharding.FSDP2 in found and not averages_over_groups(model, group):
        raise ProblemError(
            f"fully_shard has sharded {name}, and FSDP2 averages gradients over all ranks: those "
            "that share a sequence must add them. Call mf.parallel.average_over_groups(model, "
            "group) once, after fully_shard."
        )
    groups = [m.sequence_group for m in model.modules() if hasattr(m, "sequence_group")]
    if Sharding.PARAMETRISED in found and any(other is not group for other in groups):
        raise ProblemError(
            f"the weights of {name} were parametrised without this sequence_group: call "
            "metafocus.trainer.distributed.parametrise(model, mesh, sequence_group=group)."
        )


def _final_hidden(model: nn.Module, group: dist.ProcessGroup | None, ranks: int) -> Tensor:
    """Return the final hidden states of two tokens for each rank, `[1, S, D]`."""
    size = model.config.get_text_config().vocab_size  # pyright: ignore
    index = torch.arange(2 * ranks, device=next(model.parameters()).device)[None]
    inputs = model_inputs(
        model, (index + size // 2) % size, index, Spans(torch.zeros_like(index), index + 1), group
    )
    return heads.read_hidden(heads.output_head(model), lambda: model(**inputs))
