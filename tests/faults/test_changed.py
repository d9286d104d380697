"""A run that is resumed knows what changed since its checkpoint, and what it was made of."""

from __future__ import annotations

import json
import shutil
from importlib import metadata

import numpy as np
import pytest
import torch
from commands import chat, read_json, run, training, tree, write
from injected import SAVING, Seen
from trainer_script import SAMPLES, arguments, tiny, trainer, weights

from metafocus.errors import DataError
from metafocus.trainer.fingerprint import RUN, digest, fingerprint

SHORT = {**SAVING, "max_steps": 4}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run of four steps, of which the checkpoints 1 and 2 are left."""
    folder = tmp_path_factory.mktemp("half")
    trainer(tiny(torch.float32), folder, **SHORT).train()
    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    return folder


@pytest.fixture
def begun(half, tmp_path):
    return shutil.copytree(half, tmp_path / "run")


def resumed(folder, *, samples=SAMPLES, callbacks=None, **changes):
    run = trainer(tiny(torch.float32), folder, samples=samples, callbacks=callbacks,
                  **{**SHORT, **changes})  # fmt: skip
    return run, run.train(resume_from_checkpoint=True)


def test_the_same_run_says_nothing(begun, capsys):
    resumed(begun, logging_steps=2)
    assert "changed" not in capsys.readouterr().out


CHANGES = {
    "learning_rate": (0.02, "learning_rate 0.01 -> 0.02"),
    "adam_beta2": (0.9, "adam_beta2 0.999 -> 0.9"),
    "inner_steps": (3, "inner_steps 2 -> 3"),
    "seed": (12, "seed 11 -> 12"),
    "gradient_accumulation_steps": (2, "micro_batches_per_step 1 -> 2"),
    "mask": ("causal", "mask None -> causal"),
    "lr_scheduler_type": ("cosine", "lr_scheduler_type linear -> cosine"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_result_is_refused_by_name(begun, name):
    value, text = CHANGES[name]
    before = tree(begun)
    with pytest.raises(DataError, match=f"checkpoint-2 was trained otherwise: {text}. Give the"):
        resumed(begun, **{name: value})
    assert tree(begun) == before


def test_other_data(begun):
    other = [*SAMPLES[:-1], {**SAMPLES[-1], "input_ids": SAMPLES[-1]["input_ids"].flip(0)}]
    with pytest.raises(DataError, match=r"otherwise: data: hash .* -> "):
        resumed(begun, samples=other)
    with pytest.raises(DataError, match="data: samples 8 -> 7"):
        resumed(begun, samples=SAMPLES[:7])


def test_data_are_hashed_in_full_or_not_at_all():
    """The repr of a long array leaves out its middle; samples of other kinds have no names."""
    ids = np.arange(5000)
    other = np.where(ids == 2500, 0, ids)
    assert digest([{"input_ids": ids}]) != digest([{"input_ids": other}])
    assert digest([{"input_ids": ids}]) == digest([{"input_ids": torch.arange(5000)}])
    assert digest([(1, 2)]) == {"samples": 1}


def test_ranks_in_place_of_accumulation_are_the_same_step(tmp_path, monkeypatch):
    """`micro_batch` starts are counted over ranks as one process would meet them."""
    one = arguments(tmp_path, gradient_accumulation_steps=2)
    two, model = arguments(tmp_path), tiny()
    expected = fingerprint(one, one, model, SAMPLES, None)
    assert fingerprint(two, two, model, SAMPLES, None) != expected
    monkeypatch.setattr(type(two), "world_size", 2)
    assert fingerprint(two, two, model, SAMPLES, None) == expected


def test_another_call_of_train_sees_what_changed(begun):
    run = trainer(tiny(torch.float32), begun, **SHORT)
    run.train(resume_from_checkpoint=str(begun / "checkpoint-2"))
    run.args.adam_beta2 = 0.9
    with pytest.raises(DataError, match=r"adam_beta2 0\.999 -> 0\.9"):
        run.train(resume_from_checkpoint=str(begun / "checkpoint-2"))


def test_another_model(begun):
    run = trainer(tiny(torch.float32, attn_implementation="eager"), begun, **SHORT)
    with pytest.raises(DataError, match="trained parameters, sdpa -> Qwen2ForCausalLM with"):
        run.train(resume_from_checkpoint=True)


def test_other_versions_are_noted(begun, capsys):
    file = begun / "checkpoint-2" / RUN
    content = json.loads(file.read_text())
    content["versions"]["torch"] = "2.0"
    file.write_text(json.dumps(content))
    resumed(begun)
    text = f"resuming from checkpoint-2; changed since: torch 2.0 -> {metadata.version('torch')}"
    assert text in capsys.readouterr().out


def test_a_checkpoint_without_a_fingerprint_is_resumed(begun):
    (begun / "checkpoint-2" / RUN).unlink()
    run, _ = resumed(begun, seed=3)
    assert run.state.global_step == 4


def test_learning_rate_and_betas_given_anew_take_effect(begun, capsys):
    seen = Seen()
    new = {"learning_rate": 0.04, "adam_beta1": 0.5, "weight_decay": 0.1, "allow_changed": True}
    run, _ = resumed(begun, callbacks=[seen], **new)
    # Linear to 0 in four steps: the last two have a half and a quarter of the new rate.
    assert seen.rates == pytest.approx([0.02, 0.01])
    group = run.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.999), 0.1)
    out = capsys.readouterr().out
    assert "changed since: adam_beta1 0.9 -> 0.5; learning_rate 0.01 -> 0.04; weight" in out


FALLING = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    # Losses that fall are a plateau of the largest: each evaluation halves the rate.
    "lr_scheduler_kwargs": {"mode": "max", "patience": 0, "factor": 0.5},
    "eval_strategy": "steps",
    "eval_steps": 1,
}


def falling(folder, place=None, **changes) -> list[float]:
    """The rates of a run whose schedule follows the loss."""
    seen = Seen()
    settings = {**SHORT, **FALLING, **changes}
    run = trainer(tiny(torch.float32), folder, heldout=SAMPLES[:4], callbacks=[seen], **settings)
    run.train(resume_from_checkpoint=place)
    return seen.rates


def test_a_schedule_that_follows_the_loss_goes_on_where_it_was(tmp_path):
    rates = falling(tmp_path)
    assert rates == pytest.approx([1e-2, 1e-2, 5e-3, 2.5e-3])
    place = str(tmp_path / "checkpoint-2")
    assert falling(tmp_path, place) == pytest.approx(rates[2:])
    twice = falling(tmp_path, place, learning_rate=2e-2, allow_changed=True)
    assert twice == pytest.approx([2 * rate for rate in rates[2:]])


def test_longer_and_shorter(begun, capsys):
    run, _ = resumed(begun, max_steps=5)
    assert run.state.global_step == 5
    assert "changed since: max_steps 4 -> 5" in capsys.readouterr().out
    before = tree(begun)
    with pytest.raises(DataError, match=r"max_steps=3 is below the 5 steps of .*checkpoint-5: rai"):
        resumed(begun, max_steps=3)
    assert tree(begun) == before


def test_a_finished_run_repeated(tmp_path, capsys):
    """transformers would take a step more, and write its checkpoint."""
    folder = tmp_path / "run"
    first = trainer(tiny(torch.float32), folder, **{**SHORT, "max_steps": 3})
    first.train()
    before = tree(folder)
    run, result = resumed(folder, max_steps=3)
    assert run.finished and run.state.global_step == result.global_step == 3
    assert torch.equal(weights(run.model), weights(first.model))
    assert tree(folder) == before
    out = capsys.readouterr().out
    assert f"the run in {folder} has taken all of its 3 steps: nothing was trained, and" in out


def test_metrics_are_those_of_the_whole_run(half, tmp_path):
    whole = trainer(tiny(torch.float32), tmp_path / "whole", **SHORT).train().metrics
    place = shutil.copytree(half, tmp_path / "parts")
    file = place / "checkpoint-2" / RUN
    content = json.loads(file.read_text())
    content["so_far"]["seconds"] += 100.0
    file.write_text(json.dumps(content))
    run, result = resumed(place)
    # Losses are summed in another order, in float32.
    assert result.metrics["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)
    assert result.training_loss == result.metrics["train_loss"]
    assert result.metrics["train_runtime"] > 100
    assert result.metrics["train_steps_per_second"] == pytest.approx(
        4 / result.metrics["train_runtime"], abs=1e-3
    )
    last = run.state.log_history[-1]
    assert last["train_runtime"] == result.metrics["train_runtime"]


# --- the command -------------------------------------------------------------------------------


def test_the_command(tmp_path):
    chats = write(tmp_path / "chats.jsonl", *map(chat, range(10)))
    output = tmp_path / "out"
    words = training(chats, output, save_strategy="steps", save_steps=1)
    assert run(*words).code == 0
    again = [*words, "--resume_from_checkpoint", "true"]
    before = tree(output)
    done = run(*again)
    assert done.code == 0 and "has taken all of its 3 steps" in done.out, done.err
    assert tree(output) == before
    changed = run(*again, "--learning_rate", "0.5", "--max_steps", "4")
    assert changed.code == 2
    assert "was trained otherwise: learning_rate 0.003 -> 0.5" in changed.err
    allowed = run(*again, "--learning_rate", "0.01", "--max_steps", "4", "--allow_changed", "true")
    assert allowed.code == 0, allowed.err
    results = read_json(output / "train_results.json")
    assert results["train_runtime"] > read_json_of(before, "train_results.json")["train_runtime"]
    # Killed between the last checkpoint and the report: the same command ends what is left.
    (output / "metafocus.json").unlink()
    (output / "model.safetensors").unlink()
    rest = run(*again, "--learning_rate", "0.01", "--max_steps", "4", "--allow_changed", "true")
    assert rest.code == 0 and "saved in" in rest.out
    assert (output / "metafocus.json").exists() and (output / "model.safetensors").exists()


def read_json_of(files: dict, name: str) -> dict:
    return json.loads(files[name])
