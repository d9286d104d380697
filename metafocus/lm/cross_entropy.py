"""The cross entropy of a chunk of positions as plain operators, and its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metafocus.precision import wide

IGNORED = -100
"""The target of a position that is not scored, as everywhere in torch and transformers."""


@dataclass(frozen=True)
class LogitHead:
    """What a model does to the output of its head: `softcap * tanh(scale * x / softcap)`.

    Args:
        scale: factor of the logits (Cohere, Granite).
        softcap: bound of their absolute value (Gemma), or None.

    Example:
        >>> LogitHead(scale=2.0)(torch.tensor([1.0, 3.0]))
        tensor([2., 6.])
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = x if self.scale == 1 else x * self.scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative, from the value that `__call__` returned."""
        return (
            self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap) ** 2)
        )


def entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross entropies of wide logits, 0 where the target is -100."""
    kept = targets != IGNORED
    index = torch.where(kept, targets, 0).unsqueeze(-1)
    losses = logits.logsumexp(-1) - logits.gather(-1, index).squeeze(-1)
    return torch.where(kept, losses, 0).sum()


def chunk_loss(logit_head: LogitHead, h: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    """Return the summed cross entropy of one chunk."""
    return entropies(logit_head(wide(F.linear(h, w, b))), y)


def _residual(logits: Tensor, y: Tensor) -> Tensor:
    """Return the gradient by the logits: softmax minus one-hot, 0 where not scored."""
    kept = (y != IGNORED).unsqueeze(-1)
    index = torch.where(kept, y.unsqueeze(-1), 0)
    # The in-place form of scatter_add cannot take a batched source into a tensor without a batch.
    hit = index == torch.arange(logits.shape[-1], device=y.device)
    return torch.where(kept, logits.softmax(-1) - hit.to(logits.dtype), 0)


def chunk_grads(
    logit_head: LogitHead,
    wanted: list[bool],
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    y: Tensor,
    g: Tensor,
) -> list[Tensor]:
    """Return the gradients that are wanted, times `g`."""
    logits = logit_head(wide(F.linear(h, w, b)))
    r = (g * logit_head.slope(logits) * _residual(logits, y)).to(w.dtype)
    parts = (lambda: r @ w, lambda: r.mT @ h, lambda: r.sum(0))
    return [part() for part, wants in zip(parts, wanted, strict=True) if wants]
