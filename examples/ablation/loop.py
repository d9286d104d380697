"""The loop that fine-tunes a cell: AdamW, a linear warm-up, a cosine to zero, clipped gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import metafocus as mf
from metafocus.errors import NonFiniteError

WARM_UP, WEIGHT_DECAY, CLIP = 0.1, 0.01, 1.0


class History(NamedTuple):
    """What each step saw: the outer loss, and the inner loss before the first and the last step."""

    loss: list[float]
    inner_first: list[float | None]
    inner_last: list[float | None]


def fine_tune(
    model: nn.Module,
    meta_loss: mf.MetaLoss,
    samples: Sequence[dict[str, Tensor]],
    collate: Callable[[Any], dict[str, Tensor]],
    *,
    steps: int,
    rows: int,
    lr: float,
    seed: int,
) -> History:
    """Train the model; the seed fixes the order of the samples."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, steps))
    order, history = batches(len(samples), rows, seed), History([], [], [])
    model.train()
    for step in range(steps):
        batch = collate([samples[i] for i in next(order)])
        loss, aux = meta_loss({}, mf.Episode(batch, batch))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        if not torch.isfinite(loss + norm):
            raise NonFiniteError(f"step {step}: loss {loss.item()}, gradient norm {norm.item()}")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        inner = aux.inner_losses.tolist()
        history.loss.append(loss.item())
        history.inner_first.append(inner[0] if inner else None)
        history.inner_last.append(inner[-1] if inner else None)
    return history


def factor(step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0, as a fraction of the peak."""
    warm = math.ceil(WARM_UP * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def batches(size: int, rows: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of indices forever, each epoch in a new order of its own generator."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < rows:
            waiting += torch.randperm(size, generator=generator).tolist()
        yield waiting[:rows]
        waiting = waiting[rows:]
