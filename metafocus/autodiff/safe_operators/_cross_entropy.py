"""Cross-entropy whose double backward does no useless work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute `-log softmax(input)[target]` like `F.cross_entropy`, by `gather`.

    torch records that the derivative of its `nll_loss` depends on the log-probabilities, with a
    derivative of zero: every second derivative then pushes zeros of the size of the logits back
    through the softmax. Only the common case is written out: class indices, no weights, no
    smoothing, no autocast. All other cases call torch, which also raises its own errors.
    """
    axis = min(input.ndim - 1, 1)
    common = (
        target.shape == input.shape[:axis] + input.shape[axis + 1 :]
        and not target.is_floating_point()
        and not torch.is_autocast_enabled(input.device.type)
        and weight is size_average is reduce is None
        and not label_smoothing
        and reduction in ("mean", "sum", "none")
    )
    if not common:
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    kept = target != ignore_index
    places = torch.where(kept, target, 0).long().unsqueeze(axis)
    chosen = F.log_softmax(input, axis).gather(axis, places).squeeze(axis)
    losses = -torch.where(kept, chosen, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / kept.sum() if reduction == "mean" else losses.sum()
