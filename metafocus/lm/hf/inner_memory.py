"""Whether an inner loop has the memory to keep activations instead of recomputing them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from metafocus.lm.hf import prefix
from metafocus.masks import Batch

PART = 0.5
"""The part of the free memory that activations of the inner loop may take."""

log: logging.Logger = logging.getLogger("metafocus.checkpointing")


class Fitting:
    """Decides, once for each number of tokens, whether a loss checkpoints its activations.

    It does not where what the layers above the cut would keep fits into half of the free memory.
    It does in a distributed run, whose processes must decide alike, and for a compiled or sharded
    model. The decision is logged (`metafocus.checkpointing`, level INFO).
    """

    def __init__(self) -> None:
        self.decided: dict[int, bool] = {}

    def __call__(self, model: nn.Module, batch: Batch) -> bool:
        """Return whether to checkpoint.

        Args:
            model: A Hugging Face model with checkpointing enabled.
            batch: A prepared batch.
        """
        tokens = batch["model_inputs"]["input_ids"].numel()
        if tokens not in self.decided:
            self.decided[tokens] = self._decide(model, batch, tokens)
        return self.decided[tokens]

    def _decide(self, model: nn.Module, batch: Batch, tokens: int) -> bool:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return True
        if prefix.has_own_call(model):
            return True
        config = model.config.get_text_config()  # pyright: ignore
        hidden = batch.get("hidden")
        layers = config.num_hidden_layers - (0 if hidden is None else hidden.first)
        need = layers * tokens * kept_per_token(model)
        free = free_bytes(next(model.parameters()).device)
        keeps = need <= PART * free
        log.info(
            "inner loop, %d tokens: %s checkpointing (activations of %d layers: %.1f GB; free: "
            "%.1f GB)", tokens, "without" if keeps else "with", layers, need / 1e9, free / 1e9,
        )  # fmt: skip
        return not keeps


def kept_per_token(model: nn.Module) -> int:
    """Return about how many bytes a layer keeps for its gradient, for each token.

    Four tensors of the width of the MLP, ten of the width of the model, and six of that width in
    float32 for the norms: what Qwen2 and Llama keep, rounded up.
    """
    config = model.config.get_text_config()  # pyright: ignore
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    size = next(model.parameters()).element_size()
    return size * (4 * wide + 10 * hidden) + max(size, 4) * 6 * hidden


def free_bytes(device: torch.device) -> int:
    """Return how much memory is free on a device; 0 where that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    if device.type != "cpu":
        return 0
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    found = (line for line in lines if line.startswith("MemAvailable:"))
    return next((1024 * int(line.split()[1]) for line in found), 0)
