"""The classes: each is a set of runs that must have one trajectory, the loss and gradient norm of
every step.

Everything is float64, and nothing depends on a random generator but the data and the start of the
fast weights: a stored trajectory should hold on another machine to rounding.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from models import replace_norms
from problems import maml
from torch import Tensor, nn
from trainer_script import COLLATOR, SAMPLES, arguments, tiny
from transformers import TrainerCallback

import metafocus as mf
from metafocus.comparison.report import environment
from metafocus.trainer import FocusTrainer

Trajectory = list[dict[str, float]]
Run = Callable[[], Trajectory]

STEPS = 4
SFT = {"method": "sft", "mask": "context-bidirectional"}
# One start for a step and an inner loop for each example: how a step is cut must not matter then.
APART = {"adaptation_start": "step", "per_example": True}


def model_of() -> nn.Module:
    """A tiny Qwen2 whose weights are a formula and whose norms do not round to float32."""
    model = tiny()
    replace_norms(model)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.ndim > 1:
                wave = torch.sin(0.7 * torch.arange(p.numel(), dtype=p.dtype) + i)
                p.copy_(wave.view_as(p) * (2 / p.shape[-1]) ** 0.5)
    return model


# --- the Trainer ---------------------------------------------------------------------------------


class Diary(FocusTrainer):
    """Keeps losses as they are: the log rounds them to float32."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.told: Trajectory = []
        self.sum = 0.0
        self.add_callback(Look(self))

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.sum += loss.item() / self.accelerator.num_processes
        return loss


class Look(TrainerCallback):
    def __init__(self, run: Diary):
        self.run = run

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(x.item() for x in squares))
        self.run.told.append({"loss": self.run.sum, "grad_norm": norm})
        self.run.sum = 0.0


def trainer_run(batch: int = 2, accumulation: int = 2, **changes) -> Trajectory:
    """Four steps of gradient descent on four samples each; the last two take them in again."""
    settings = dict(
        max_steps=STEPS, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, train_sampling_strategy="sequential",
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
        logging_strategy="no",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # transformers is about to rename gradient checkpointing.
        warnings.simplefilter("ignore", FutureWarning)
        run = Diary(
            model_of(),
            arguments(folder, **{**settings, **changes}),
            train_dataset=SAMPLES,
            data_collator=COLLATOR,
        )
        run.train()
    return run.told


# --- the engine ----------------------------------------------------------------------------------


def maml_run(estimator, how: str = "vmap", chunk_size: int | None = None) -> Trajectory:
    """Four outer steps of MAML with a learned rate on sinusoids."""
    case = maml()
    solver = mf.SGD(lambda outer: outer["log_lr"].exp(), steps=5, momentum=0.5)
    meta = mf.bilevel(case.problem, solver=solver, estimator=estimator)
    grad = mf.hypergrad(mf.over_tasks(meta, how=how, chunk_size=chunk_size))
    outer, told = case.outer, []
    for _ in range(STEPS):
        grads, (loss, _) = grad(outer, case.episodes)
        norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
        told.append({"loss": loss.item(), "grad_norm": norm})
        outer = {k: outer[k] - 0.05 * grads[k] for k in outer}
    return told


def focusft_run(estimator) -> Trajectory:
    """Four outer steps of FocuSFT of second order on a tiny language model."""
    model, batch = model_of(), COLLATOR(SAMPLES[:3])
    adapter = mf.LoRA(mf.top_layers(0.5, ("gate_proj", "up_proj", "down_proj")), 2, 4.0)
    solver = mf.SGD(0.5, steps=4)
    meta = mf.recipes.focusft(model, adapter=adapter, solver=solver, estimator=estimator)
    told = []
    for _ in range(STEPS):
        model.zero_grad()
        loss, _ = meta({}, mf.Episode(batch, batch))
        loss.backward()
        grads: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        told.append({"loss": loss.item(), "grad_norm": norm})
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    return told


# --- the classes ---------------------------------------------------------------------------------


def two_processes(**changes) -> Run:
    """The run of two processes, which `ranks.py` starts: they need a fresh interpreter."""
    from invariant.ranks import launch

    return lambda: launch(changes)


SECOND = {"estimator": "unrolled-recompute"}
SAVING = {"gradient_checkpointing": True}
GRAPH = mf.Unrolled()

CLASSES: dict[str, dict[str, Run]] = {
    "accumulation-sft": {
        f"batch {b} x accumulation {4 // b}": lambda b=b: trainer_run(b, 4 // b, **SFT)
        for b in (1, 2, 4)
    },
    "accumulation-per-example": {
        f"batch {b} x accumulation {4 // b}": lambda b=b: trainer_run(b, 4 // b, **APART)
        for b in (1, 2, 4)
    },
    "vmap-loop": {
        "vmap": lambda: maml_run(GRAPH),
        "vmap in chunks of 2": lambda: maml_run(GRAPH, chunk_size=2),
        "loop": lambda: maml_run(GRAPH, how="loop"),
    },
    "recompute-maml": {
        "graph": lambda: maml_run(GRAPH),
        "recompute 1": lambda: maml_run(mf.Unrolled(recompute=True)),
        "recompute 2": lambda: maml_run(mf.Unrolled(recompute=2)),
        "forward over reverse": lambda: maml_run(mf.Unrolled(hvp=mf.hvp_forward)),
    },
    "recompute-focusft": {
        "graph": lambda: focusft_run(GRAPH),
        "recompute 1": lambda: focusft_run(mf.Unrolled(recompute=True)),
        "recompute 2": lambda: focusft_run(mf.Unrolled(recompute=2)),
        "forward over reverse": lambda: focusft_run(mf.Unrolled(hvp=mf.hvp_forward)),
    },
    "checkpointing-first-order": {
        "off": lambda: trainer_run(),
        "on": lambda: trainer_run(**SAVING),
    },
    "checkpointing-second-order": {
        "off": lambda: trainer_run(**SECOND),
        "on": lambda: trainer_run(**SECOND, **SAVING),
    },
    "processes-sft": {
        "one, accumulation 4": lambda: trainer_run(1, 4, **SFT),
        "two, accumulation 2": two_processes(batch=1, accumulation=2, **SFT),
    },
    "processes-focusft": {
        "one, accumulation 4": lambda: trainer_run(1, 4),
        "two, accumulation 2": two_processes(batch=1, accumulation=2),
    },
}


def snapshot() -> dict[str, Any]:
    """What a trajectory may depend on beside the code."""
    return {**environment(torch.float64), "transformers": transformers.__version__}


def stored(name: str) -> Path:
    """Where the trajectories of a class are kept."""
    return Path(__file__).parent / "stored" / f"{name}.json"
