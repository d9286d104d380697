"""A plain training loop around a meta-loss: AdamW, warm-up, cosine, one progress bar."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.adapters import NoAdapter
from metafocus.data import Collator, Sample
from metafocus.engine import MetaLoss
from metafocus.errors import NonFiniteError
from metafocus.lm import Batch, answer_tokens, lm_loss
from metafocus.lm.tokens import predicted
from metafocus.masks import MaskPolicy
from metafocus.types import Episode


@dataclass(frozen=True)
class Schedule:
    """How long and how fast the outer loop learns; the defaults are FocuSFT's.

    Args:
        steps: outer steps.
        batch_size: samples in each.
        lr: peak learning rate of AdamW, after a linear warm-up and before a cosine to 0.
        warmup: the fraction of steps that warm up.
        weight_decay: of AdamW.
        clip: the largest norm of the outer gradient.
        seed: of the data order.
    """

    steps: int
    batch_size: int = 4
    lr: float = 1e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}.")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be >= 0 and finite, got {self.weight_decay}.")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be in [0, 1], got {self.warmup}.")

    def factor(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, as a fraction of the peak."""
        warm = math.ceil(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1)))


@dataclass
class History:
    """What each outer step saw: the outer loss, the inner losses, the gradient norm."""

    loss: list[float] = field(default_factory=list)
    inner_first: list[float | None] = field(default_factory=list)
    inner_last: list[float | None] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)


def train(
    model: nn.Module,
    meta_loss: MetaLoss,
    samples: Sequence[Sample],
    collator: Collator,
    schedule: Schedule,
    *,
    progress: bool = True,
) -> History:
    """Train the parameters of `model` that require grad on `meta_loss({}, Episode(batch, batch))`.

    Args:
        model: what `meta_loss` trains.
        meta_loss: such as `recipes.focusft(model)`.
        samples: encoded chats.
        collator: makes batches of them.
        schedule: steps, batch size, learning rate, ...
        progress: show a progress bar on standard error.

    Returns:
        Losses and gradient norms by step.

    Raises:
        NonFiniteError: if a loss or a gradient is NaN or infinite; the model keeps its last good
            weights.
        ValueError: if there are no samples, or nothing requires grad.
    """
    from tqdm.auto import tqdm

    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters or not samples:
        raise ValueError(
            f"nothing to train: {len(parameters)} parameters require grad, {len(samples)} samples."
        )
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    order = batches(len(samples), schedule.batch_size, schedule.seed)
    history = History()
    model.train()
    bar = tqdm(range(schedule.steps), disable=not progress, desc="train", unit="step")
    for step in bar:
        batch = collate(samples, next(order), collator, device)
        loss, aux = meta_loss({}, Episode(batch, batch))
        _check(loss, "loss", step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, schedule.clip)
        _check(norm, "gradient norm", step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        inner = aux.inner_losses.tolist()
        history.loss.append(loss.item())
        history.inner_first.append(inner[0] if inner else None)
        history.inner_last.append(inner[-1] if inner else None)
        history.grad_norm.append(float(norm))
        shown = {"loss": f"{loss.item():.3f}"}
        if inner:
            shown["inner"] = f"{inner[0]:.3f} > {inner[-1]:.3f}"
        bar.set_postfix(shown)
    return history


def _check(value: Tensor, name: str, step: int) -> None:
    if not torch.isfinite(value):
        raise NonFiniteError(
            f"the outer {name} is {value.item()} at step {step}. Lower the learning rate, or look "
            "at the data."
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: Sequence[Sample],
    collator: Collator,
    *,
    mask: MaskPolicy,
    batch_size: int = 4,
) -> float:
    """Return the mean answer loss per token of the model as it is deployed: without fast weights.

    Nothing is adapted, so no label can leak.
    """
    loss = lm_loss(model, adapter=NoAdapter(), mask=mask)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(samples), batch_size):
        chosen = range(first, min(first + batch_size, len(samples)))
        batch = collate(samples, chosen, collator, device)
        tokens = int(predicted(answer_tokens, batch).sum())
        total += float(loss({}, {}, batch)) * tokens
        count += tokens
    model.train(was_training)
    return total / max(count, 1)


def batches(size: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of indices forever, each epoch in a new order of its own generator."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += torch.randperm(size, generator=generator).tolist()
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def collate(
    samples: Sequence[Sample], chosen: Any, collator: Collator, device: torch.device
) -> Batch:
    """Return the chosen samples as a batch on a device."""
    batch = collator([samples[i] for i in chosen])
    return {k: v.to(device) for k, v in batch.items()}


def plain_sft(model: nn.Module, mask: MaskPolicy) -> MetaLoss:
    """Return ordinary supervised fine-tuning as a meta-loss: FocuSFT without fast weights."""
    from metafocus.recipes import _focusft as focusft

    return focusft(model, adapter=NoAdapter(), mask=mask)
