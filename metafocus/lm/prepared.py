"""Whether what a loss has added to a batch still belongs to the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metafocus.masks import Batch, MaskPolicy
from metafocus.torch_internals import outside_transforms, plain, tracing, version

ADDED = ("model_inputs", "scored", "each", "hidden", "source")
"""The entries that `prepare` adds to a batch."""


@dataclass(frozen=True, eq=False)
class Source:
    """The mask policy and the tensors that a batch was prepared from.

    Args:
        mask: The mask policy.
        tensors: The tensors of the batch, which stay alive: their memory is not used anew.
        states: Where each of them lies, and how often it had been written to.
    """

    mask: MaskPolicy
    tensors: dict[str, Tensor]
    states: dict[str, Any]

    @classmethod
    def of(cls, mask: MaskPolicy, batch: Batch) -> Source:
        """Return the source of a batch that is being prepared."""
        own = {k: v for k, v in batch.items() if k not in ADDED and isinstance(v, Tensor)}
        if tracing():
            return cls(mask, own, {})
        with outside_transforms():
            tensors = {k: plain(v) for k, v in own.items()}
            return cls(mask, tensors, {k: _state(v) for k, v in tensors.items()})

    def fits(self, mask: MaskPolicy, batch: Batch) -> bool:
        """Return whether a batch still consists of these tensors, not written to since."""
        if self.mask is not mask and self.mask != mask:
            return False
        if tracing():
            return True
        with outside_transforms():
            return all(
                isinstance(batch.get(k), Tensor) and _state(plain(batch[k])) == state
                for k, state in self.states.items()
            )


def current(mask: MaskPolicy, batch: Batch) -> Batch:
    """Return a batch without what was prepared for another mask, or from other tensors.

    Example:
        >>> from metafocus.masks import causal, full
        >>> ids = torch.tensor([[1, 2]])
        >>> batch = {"input_ids": ids, "model_inputs": {}}
        >>> batch["source"] = Source.of(causal, batch)
        >>> sorted(current(causal, batch)), sorted(current(full, batch))
        (['input_ids', 'model_inputs', 'source'], ['input_ids'])
        >>> _ = ids.add_(1)
        >>> sorted(current(causal, batch))
        ['input_ids']
    """
    source = batch.get("source")
    if source is None or source.fits(mask, batch):
        return batch
    return {k: v for k, v in batch.items() if k not in ADDED}


def _state(x: Tensor) -> tuple[Any, ...]:
    memory = None if x.is_meta else x.data_ptr()
    return memory, x.shape, x.stride(), x.dtype, version(x)
