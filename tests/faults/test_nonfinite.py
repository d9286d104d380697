"""A number that is none, wherever it comes up, reaches neither the weights nor a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from injected import (
    PLACES,
    SAVING,
    Seen,
    infinite_gradient,
    moved,
    nan_gradient,
    nan_loss,
    poisoned,
)
from safetensors.torch import load_file
from trainer_script import tiny, trainer, weights
from transformers import TrainerCallback

from metafocus.errors import NonFiniteError, ProblemError


def whole(folder) -> list[str]:
    """The checkpoints of a folder, each with finite weights and optimiser state."""
    found = sorted(folder.glob("checkpoint-*"))
    for path in found:
        assert all(v.isfinite().all() for v in load_file(path / "model.safetensors").values())
        state = torch.load(path / "optimizer.pt", weights_only=True)["state"]
        assert all(v.isfinite().all() for entry in state.values() for v in entry.values())
    return [path.name for path in found]


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("place", PLACES)
def test_a_step_is_left_out(tmp_path, place, clip):
    seen = Seen()
    run = trainer(tiny(), tmp_path, callbacks=[seen], kept=poisoned(place, {1}),
                  max_grad_norm=clip, **SAVING)  # fmt: skip
    run.train()
    assert moved(seen) == [True, False, True, True]
    # The schedule waits: the second rate is used twice, and the last one not at all.
    assert seen.rates == pytest.approx([1e-2, 7.5e-3, 7.5e-3, 5e-3])
    assert len(whole(tmp_path)) == 4
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["skipped_steps"] for entry in logs] == [0.0, 1.0, 1.0, 1.0]
    assert ["grad_norm" in entry for entry in logs] == [True, False, True, True]
    json.dumps(run.state.log_history, allow_nan=False)


@pytest.mark.parametrize("step", [0, 3])
def test_the_first_and_the_last_step(tmp_path, step):
    seen = Seen()
    trainer(tiny(), tmp_path, callbacks=[seen], kept=poisoned(nan_gradient, {step})).train()
    assert moved(seen) == [i != step for i in range(4)]


@pytest.mark.parametrize("call", [2, 3])
def test_one_micro_batch_of_a_step(tmp_path, call):
    """Gradients of micro-batches are summed: one of them spoils the step, and no other step."""
    seen = Seen()
    trainer(tiny(), tmp_path, callbacks=[seen], kept=poisoned(nan_gradient, {call}),
            gradient_accumulation_steps=2, per_device_train_batch_size=1).train()  # fmt: skip
    assert moved(seen) == [True, False, True, True]


def test_what_follows_is_the_run_without_that_step(tmp_path):
    """Adam's averages are those of the steps that were taken."""
    spoilt, straight = Seen(), Seen()
    common = {"train_sampling_strategy": "sequential", "adaptation_start": "micro-batch"}
    run = trainer(tiny(), tmp_path, callbacks=[spoilt], kept=poisoned(nan_gradient, {0}), **common,
                  max_steps=1)  # fmt: skip
    with pytest.raises(NonFiniteError, match="1 times by step 1: no step was taken"):
        run.train()
    assert run.optimizer is not None and not run.optimizer.state_dict()["state"]
    run = trainer(tiny(), tmp_path, callbacks=[straight], **common, max_steps=1)
    run.train()
    assert run.optimizer.state_dict()["state"][0]["step"] == 1


def test_too_many_in_a_row_stop_the_run(tmp_path):
    run = trainer(tiny(), tmp_path, kept=poisoned(nan_gradient, {1, 2, 3}), max_nonfinite=2,
                  **SAVING)  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"^3 steps in a row, more than max_nonfinite=2; the "):
        run.train()
    assert whole(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    # A finite step between them begins a new row.
    calm = trainer(tiny(), tmp_path / "calm", kept=poisoned(nan_gradient, {0, 1, 3}),
                   max_nonfinite=2)  # fmt: skip
    calm.train()
    assert calm.state.log_history[-2]["skipped_steps"] == 3.0


@pytest.mark.parametrize(
    ("place", "what"),
    [
        (nan_gradient, "the gradient norm is nan"),
        (infinite_gradient, "the gradient norm is inf"),
        (nan_loss, "the training loss was NaN or infinite 1"),
    ],
)
def test_stop(tmp_path, place, what):
    seen = Seen()
    run = trainer(tiny(), tmp_path, callbacks=[seen], kept=poisoned(place, {1}),
                  on_nonfinite="stop", **SAVING)  # fmt: skip
    with pytest.raises(NonFiniteError, match=f"^{what}.* at step 1. The model keeps the weights"):
        run.train()
    assert torch.equal(weights(run.model), seen.weights[-1])
    assert whole(tmp_path) == ["checkpoint-1"]


def test_the_settings_are_checked(tmp_path):
    with pytest.raises(ProblemError, match="on_nonfinite='ignore' is unknown: use one of skip"):
        trainer(tiny(), tmp_path, on_nonfinite="ignore")
    with pytest.raises(ProblemError, match="max_nonfinite must be >= 0, got -1"):
        trainer(tiny(), tmp_path, max_nonfinite=-1)


class Overflow(TrainerCallback):
    """A step that was too long for the type of one weight."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.model.norm.weight.data[3] = float("inf")


def test_weights_that_overflow_are_not_saved(tmp_path):
    run = trainer(tiny(), tmp_path, callbacks=[Overflow()], **SAVING)
    with pytest.raises(NonFiniteError, match=r"in the weights after step 2, in model.norm.weight:"):
        run.train()
    assert whole(tmp_path) == ["checkpoint-1"]


def scaled(run, scale: float):
    """An fp16 scaler on the CPU: accelerate makes one, and unscales, on an accelerator only."""
    accelerator = run.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def unscale_gradients(optimizer=None):
        for wrapped in accelerator._optimizers:
            accelerator.scaler.unscale_(wrapped.optimizer)

    accelerator.unscale_gradients = unscale_gradients
    return run


def test_what_the_scaler_leaves_out_is_counted_apart(tmp_path):
    seen = Seen()
    run = trainer(tiny(torch.float32), tmp_path, callbacks=[seen], kept=poisoned(nan_gradient, {1}))
    scaled(run, 4.0)
    run.train()
    assert moved(seen) == [True, False, True, True]
    assert seen.rates == pytest.approx([1e-2, 7.5e-3, 7.5e-3, 5e-3])
    entry = run.state.log_history[-2]
    assert (entry["scaler_skips"], entry["skipped_steps"]) == (1.0, 0.0)
    assert run.accelerator.scaler.get_scale() == 2.0


def test_at_its_lowest_scale_it_is_not_the_scaler(tmp_path):
    poison = poisoned(nan_gradient, {1, 2, 3})
    run = scaled(trainer(tiny(torch.float32), tmp_path, kept=poison, max_nonfinite=1), 2.0)
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        run.train()
    assert run._guard.scaler_skips == 1
