"""Faults that tests inject into a run: a loss or a gradient that is no number, and what it saw."""

from __future__ import annotations

import torch
from trainer_script import ADAPTER, weights
from transformers import TrainerCallback

import metafocus as mf

SAVING = {"save_strategy": "steps", "save_steps": 1}


def nan_gradient(loss, model):
    """The loss as it is; the derivative of the root at zero is infinite, times zero: NaN."""
    return loss + (0 * model.model.norm.weight).sqrt().sum()


def infinite_gradient(loss, model):
    """The loss as it is; the derivative of the root at zero is infinite."""
    weight = model.model.norm.weight
    return loss + (weight - weight.detach()).sqrt().sum()


def nan_loss(loss, model):
    return loss * float("nan")


def infinite_loss(loss, model):
    return loss * float("inf")


def nan_loss_alone(loss, model):
    """No gradient shows it."""
    return loss + float("nan")


PLACES = [nan_gradient, infinite_gradient, nan_loss, infinite_loss, nan_loss_alone]


def poisoned(place, calls):
    """A `meta_loss_factory` whose loss is spoilt by `place` in its `calls`, counted from 0."""

    def factory(model, generator):
        meta = mf.recipes.focusft(model, adapter=ADAPTER, generator=generator)
        count = iter(range(10**9))

        def meta_loss(outer, episode):
            loss, aux = meta(outer, episode)
            return (place(loss, model) if next(count) in calls else loss), aux

        return meta_loss

    return {"meta_loss_factory": factory}


class Seen(TrainerCallback):
    """The weights after each step, from those at the beginning; the learning rate of each step."""

    def __init__(self):
        self.weights, self.rates = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))


def moved(seen: Seen) -> list[bool]:
    """For each step, whether it changed the weights."""
    pairs = zip(seen.weights, seen.weights[1:], strict=False)
    return [not torch.equal(a, b) for a, b in pairs]
