"""The Trainer where several ranks share each sequence: the batches they get, and what counts once.

The Trainer and accelerate know ranks only; here `size` consecutive ranks are one rank of the data.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from transformers import TrainingArguments

from metafocus.errors import ProblemError


def check_sequence_parallel(size: int, args: TrainingArguments, factory: Any) -> None:
    """Raise for what cannot be combined with shared sequences, and for accelerate's own way."""
    own = getattr(args, "parallelism_config", None)
    theirs = getattr(own, "sp_size", None) or int(os.environ.get("PARALLELISM_CONFIG_SP_SIZE") or 1)
    if theirs > 1:
        raise ProblemError(
            f"parallelism_config with sp_size={theirs} is accelerate's sequence parallelism, which "
            "DeepSpeed runs, under a causal mask and without second derivatives. Leave it out and "
            f"set sequence_parallel={theirs} (--sequence_parallel {theirs})."
        )
    if size == 1:
        return
    for name, value, why in (
        ("meta_loss_factory", factory, "it makes a loss that does not share sequences"),
        ("torch_compile", args.torch_compile, "exchanges between ranks are not compiled"),
    ):
        if value:
            raise ProblemError(
                f"{name} is not supported together with sequence_parallel={size}: {why}. Leave one "
                "of them out."
            )


def with_shared_batches(loader: Any, size: int, ranks: int, rank: int) -> Any:
    """Give all ranks that share sequences the batches of one data-parallel rank.

    Args:
        loader: as accelerate has prepared it; its sampler is changed.
        size: the ranks that share a sequence.
        ranks: the number of processes.
        rank: of this process.

    Returns:
        The loader.

    Raises:
        ProblemError: for a data set that is not divided by a sampler.
    """
    if size == 1:
        return loader
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, BatchSamplerShard) or sampler.split_batches:
        raise ProblemError(
            f"sequence_parallel={size} needs a data set with a length, whose batches a sampler "
            f"divides among the ranks; this one is read by {type(loader).__name__}. Pass a list or "
            "a map-style data set, with split_batches and dispatch_batches left False."
        )
    sampler.num_processes, sampler.process_index = ranks // size, rank // size
    if ranks == size:
        # All ranks share one sequence, so the last batch may be smaller, as in one process.
        sampler.even_batches = False
    return loader
