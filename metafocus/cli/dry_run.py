"""`metafocus train --dry_run`: the memory and the time of a step, measured before the run."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from metafocus.comparison.memory import process_memory
from metafocus.data import Sample
from metafocus.models import described
from metafocus.trainer.config import FocusArguments
from metafocus.trainer.trainer import FocusTrainer

STEPS = 3
"""One step that allocates, one with the longest samples, one with samples of middle length."""


def shortened(samples: Sequence[Sample], args: FocusArguments) -> list[Sample]:
    """Return the samples of a dry run, and let the arguments take its steps and write nothing."""
    rows = _rows(args)
    by_length = sorted(range(len(samples)), key=lambda i: -len(samples[i]["input_ids"]))
    longest = itertools.islice(itertools.cycle(by_length), rows)
    middle = max((len(by_length) - rows) // 2, 0)
    typical = itertools.islice(itertools.cycle(by_length[middle:]), rows)
    heavy = [samples[i] for i in longest]
    args.max_steps = STEPS
    args.train_sampling_strategy = "sequential"
    args.save_strategy = SaveStrategy.NO
    args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
    args.report_to = []
    args.push_to_hub = args.load_best_model_at_end = args.eval_on_start = False
    return [*heavy, *heavy, *(samples[i] for i in typical)]


def planned_steps(samples: Sequence[Sample], args: FocusArguments) -> int:
    """Return how many optimiser steps the whole run takes."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * math.ceil(len(samples) / _rows(args)))


def measured(trainer: FocusTrainer, planned: int) -> str:
    """Take the steps of a dry run; return what they needed as a text of several lines."""
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    model: Any = trainer.model
    args: Any = trainer.args
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = trainer.optimizer
    state = [x for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
    heavy, typical = clock.seconds[1:]
    lines = {
        "model": described(model),
        "step": f"{_rows(args)} samples ({args.per_device_train_batch_size} on each of "
        f"{args.world_size} processes, {args.gradient_accumulation_steps} times)",
        "time": f"{heavy:.2f} s with the longest samples, {typical:.2f} s with samples of middle "
        "length",
        "run": f"{planned} steps: about {_duration(planned * typical)}, without evaluation and "
        "checkpoints",
        "tensors": f"{_mb(model.parameters())} weights, {_mb(trained)} gradients, {_mb(state)} "
        "optimiser",
        "peak": _peak(args.device),
    }
    return "\n".join(f"{name:<8} {line}" for name, line in lines.items())


class _Clock(TrainerCallback):
    """Measures each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Begin, with nothing left to do on the device."""
        _finish(args.device)
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """End, when the device has done all."""
        _finish(args.device)
        self.seconds.append(time.perf_counter() - self._start)
        if state.is_world_process_zero:
            # On a CPU a step may take minutes.
            last = f"{self.seconds[-1]:.2f} s"
            print(f"measured step {len(self.seconds)} of {STEPS}: {last}", flush=True)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rows(args: FocusArguments) -> int:
    micro = args.per_device_train_batch_size * max(args.world_size, 1)
    return micro * args.gradient_accumulation_steps


def _mb(tensors: Any) -> str:
    return f"{sum(x.numel() * x.element_size() for x in tensors) / 2**20:,.1f} MB"


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device).total_memory
        used = torch.cuda.max_memory_reserved(device)
        return f"{used / 2**20:,.0f} MB of {of / 2**20:,.0f} MB on {device}"
    if not Path("/proc/self/status").exists():
        return "not measured: this system has no /proc"
    return f"{process_memory('VmHWM') / 2**20:,.0f} MB in this process"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
