"""Checkpoints are counted by step: neither clocks nor older runs delete the newest."""

from __future__ import annotations

import os
import time

import pytest
import torch
from injected import SAVING
from trainer_script import SAMPLES, tiny, trainer
from transformers import TrainerCallback

from metafocus.trainer.checkpoints import damage, resumable
from metafocus.trainer.staging import rotate


class ClockBack(TrainerCallback):
    """After each checkpoint the clock is an hour earlier than at the one before."""

    def __init__(self):
        self.now = time.time()

    def on_save(self, args, state, control, **kwargs):
        self.now -= 3600
        path = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        for name in [path, *(entry.path for entry in os.scandir(path))]:
            os.utime(name, (self.now, self.now))


@pytest.mark.parametrize("limit", [1, 2])
def test_a_clock_that_goes_backwards(tmp_path, limit):
    trainer(tiny(torch.float32), tmp_path, callbacks=[ClockBack()], save_total_limit=limit,
            **SAVING).train()  # fmt: skip
    left = sorted(path.name for path in tmp_path.glob("*"))
    assert left == [f"checkpoint-{step}" for step in range(5 - limit, 5)]
    assert resumable(tmp_path) == tmp_path / "checkpoint-4"


def test_the_newest_of_the_run_stays_beside_those_of_a_longer_one(tmp_path):
    trainer(tiny(torch.float32), tmp_path, **SAVING).train()
    run = trainer(tiny(torch.float32), tmp_path, save_total_limit=2, max_steps=4, save_steps=1,
                  save_strategy="steps")  # fmt: skip

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    run.add_callback(Stop())
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sorted(path.name for path in tmp_path.glob("*")) == ["checkpoint-3", "checkpoint-4"]


def test_what_was_not_saved_whole_is_not_counted(tmp_path):
    trainer(tiny(torch.float32), tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-9").mkdir()
    rotate(tmp_path, 2, {tmp_path / "checkpoint-4"})
    left = sorted(path.name for path in tmp_path.glob("*"))
    assert left == ["checkpoint-3", "checkpoint-4", "checkpoint-9"]


def test_the_best_one_stays(tmp_path):
    run = trainer(tiny(torch.float32), tmp_path, heldout=SAMPLES[:4], save_total_limit=2,
                  eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
                  metric_for_best_model="loss", greater_is_better=True, learning_rate=1e-3,
                  **SAVING)  # fmt: skip
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = tmp_path / f"checkpoint-{losses.index(max(losses)) + 1}"
    assert run.state.best_model_checkpoint == str(best)
    left = sorted(tmp_path.glob("checkpoint-*"))
    assert left == sorted({best, tmp_path / "checkpoint-4"})
    assert [damage(path) for path in left] == [None] * len(left)
