"""A training run that is killed and resumed is the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_script import CRASH_STEPS, tiny, trainer

from metafocus.errors import DataError
from metafocus.trainer.checkpoints import SEAL, damage, other_ranks, require_complete, resumable
from metafocus.trainer.staging import STAGE

SCRIPT = Path(__file__).parent / "trainer_script.py"


@pytest.mark.slow
def test_killed_three_times_and_bit_identical(tmp_path):
    """SIGKILL at random moments: losses, gradient norms, inner losses and weights do not differ."""
    command = [sys.executable, str(SCRIPT), "crash", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["codes"] == [0, 0], done.stderr
    assert [signal for _, signal in report["kills"]] == [9, 9, 9]
    whole, killed = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    )
    reference = {entry["step"]: entry for entry in whole}
    assert sorted(reference) == list(range(1, CRASH_STEPS + 1))
    assert {entry["step"] for entry in killed} == set(reference)
    for entry in killed:
        assert entry == reference[entry["step"]]
    assert len({entry["loss"] for entry in whole}) == CRASH_STEPS
    final = [tmp_path / name / "final" / "model.safetensors" for name in ("whole", "killed")]
    assert final[0].read_bytes() == final[1].read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    run = trainer(tiny(torch.float32), folder, save_strategy="steps", save_steps=2)
    run.train()
    return folder


@pytest.fixture
def saved(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    return copy


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def resumed(folder: Path, **changes):
    run = trainer(tiny(torch.float32), folder, save_strategy="no", **changes)
    run.train(resume_from_checkpoint=True)
    return run


def test_a_whole_checkpoint_is_undamaged(finished):
    assert damage(finished / "checkpoint-4") is None
    assert resumable(finished) == finished / "checkpoint-4"
    assert require_complete(finished / "checkpoint-2") == finished / "checkpoint-2"


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", SEAL]


@pytest.mark.parametrize("how", [truncate, Path.unlink], ids=["cut", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_the_newest_complete_checkpoint_is_used(saved, name, how):
    how(saved / "checkpoint-4" / name)
    with pytest.warns(UserWarning, match="checkpoint-4 is passed over.*from checkpoint-2"):
        assert resumable(saved) == saved / "checkpoint-2"


def test_resuming_passes_over_and_finishes(saved, finished):
    truncate(saved / "checkpoint-4" / "optimizer.pt")
    with pytest.warns(UserWarning, match="resuming from checkpoint-2"):
        run = resumed(saved)
    assert run.state.global_step == 4
    before = json.loads((finished / "checkpoint-4" / SEAL).read_text())["log_history"]
    losses = {e["step"]: e["loss"] for e in before if "loss" in e}
    again = {e["step"]: e["loss"] for e in run.state.log_history if "loss" in e}
    assert again == losses


def test_a_damaged_checkpoint_alone_is_an_error(saved):
    shutil.rmtree(saved / "checkpoint-2")
    truncate(saved / "checkpoint-4" / "model.safetensors")
    with pytest.raises(DataError, match=r"checkpoint-4, is damaged: model.safetensors is .*cut"):
        resumed(saved)


def test_an_unfinished_checkpoint_alone_means_the_beginning(saved):
    """What a process leaves that was killed while saving for the first time."""
    shutil.rmtree(saved / "checkpoint-2")
    (saved / "checkpoint-4" / SEAL).unlink()
    with pytest.warns(UserWarning, match="saving was interrupted; starting from the beginning"):
        run = resumed(saved, max_steps=1)
    assert run.state.global_step == 1


def test_nothing_to_resume_is_the_beginning(tmp_path):
    assert resumed(tmp_path / "new", max_steps=1).state.global_step == 1


def test_a_named_checkpoint_must_be_complete(saved):
    truncate(saved / "checkpoint-2" / "scheduler.pt")
    run = trainer(tiny(torch.float32), saved)
    with pytest.raises(DataError, match=r"checkpoint-2.*scheduler.pt is cut off"):
        run.train(resume_from_checkpoint=str(saved / "checkpoint-2"))


def test_other_damage(saved, tmp_path):
    assert damage(tmp_path / "none") == "it is not a directory"
    state = saved / "checkpoint-4" / SEAL
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "global_step": 3}))
    assert damage(saved / "checkpoint-4") == f"{SEAL} is of step 3"
    assert "saved by 1 processes and is resumed by 2" in other_ranks(saved / "checkpoint-2", 2)
    (saved / "checkpoint-2" / "model.safetensors").write_bytes(b"\xff" * 32)
    assert damage(saved / "checkpoint-2") == "model.safetensors is missing or cut off"


def test_shards_are_looked_at(tmp_path):
    run = trainer(tiny(torch.float32), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    folder = tmp_path / "checkpoint-1"
    (folder / "model.safetensors").unlink()
    run.model.save_pretrained(folder, max_shard_size="8KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and damage(folder) is None
    truncate(shards[-1])
    assert damage(folder) == f"{shards[-1].name} is missing or cut off"


def test_a_checkpoint_is_replaced_by_a_whole_one_or_not_at_all(saved, monkeypatch):
    """A process killed while it saves again leaves what was there, and a rest that is removed."""
    before = (saved / "checkpoint-2" / SEAL).read_bytes()
    run = trainer(tiny(torch.float32), saved, save_strategy="steps", save_steps=2)

    def killed(*args, **kwargs):
        (saved / STAGE / "checkpoint-2" / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert (saved / "checkpoint-2" / SEAL).read_bytes() == before
    assert damage(saved / "checkpoint-2") is None
    assert sorted(path.name for path in saved.iterdir()) == ["checkpoint-2", "checkpoint-4"]
