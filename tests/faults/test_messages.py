"""What is wrong with a checkpoint or a place is said in one line, and another one is taken."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess

import pytest
import torch
from commands import chat, refused, training, write
from injected import SAVING
from safetensors.torch import load_file, save_file
from trainer_script import tiny, trainer

from metafocus.errors import DataError
from metafocus.trainer.checkpoints import SEAL, damage


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of three steps with whole checkpoints at 1 and 2; the third was lost."""
    folder = tmp_path_factory.mktemp("pair")
    trainer(tiny(torch.float32), folder, max_steps=3, **SAVING).train()
    shutil.rmtree(folder / "checkpoint-3")
    return folder


@pytest.fixture
def saved(pair, tmp_path):
    return shutil.copytree(pair, tmp_path / "run")


def resume(folder, place: str | bool = True):
    run = trainer(tiny(torch.float32), folder, max_steps=3, **SAVING)
    run.train(resume_from_checkpoint=place)
    return run


def edited(name: str, change):
    """A fault: `change` of the JSON in a file."""

    def damage(folder) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(content)))

    return damage


def written(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change):
    """A fault: `change` of the weights."""

    def damage(folder) -> None:
        found = load_file(folder / "model.safetensors")
        save_file(change(found), folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def stored(name: str, value):
    return lambda folder: torch.save(value, folder / name)


class Command:
    """A pickle of it runs a command where it is read as pickles are."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/metafocus-was-run",)


def poisoned(weights):
    weights["model.norm.weight"][3] = float("nan")
    return weights


def wider(weights):
    return {**weights, "model.norm.weight": torch.ones(33)}


def without(weights):
    return {k: v for k, v in weights.items() if k != "model.norm.weight"}


ADAM = torch.optim.AdamW([torch.ones(2, requires_grad=True)]).state_dict()
FAULTS = {
    "half a configuration": (
        written("config.json", b'{"model_type": '),
        "config.json is damaged: Expecting value",
    ),
    "a configuration that is a list": (written("config.json", b"[]"), "config.json is damaged: "),
    "a short state": (
        written(SEAL, b'{"global_step": 2}'),
        f"{SEAL} lacks epoch, max_steps, log_history, train_batch_size",
    ),
    "a foreign state": (
        edited(SEAL, lambda state: {**state, "engine": "other"}),
        f"{SEAL} has unknown entries: engine",
    ),
    "NaN in the weights": (
        tensors(poisoned),
        "model.safetensors holds NaN or infinity in model.norm.weight",
    ),
    "weights of another shape": (
        tensors(wider),
        r"model.safetensors holds model.norm.weight of shape \(33,\), and the model has \(32,\)",
    ),
    "a weight that is missing": (tensors(without), "its weights lack model.norm.weight, which"),
    "an optimiser of another model": (
        stored("optimizer.pt", ADAM),
        r"optimizer.pt is of 1 parameters, and the model trains \d+",
    ),
    "an optimiser that is none": (stored("optimizer.pt", [1, 2]), "optimizer.pt cannot be read: "),
    "a pickle with a command": (
        stored("optimizer.pt", Command()),
        "optimizer.pt cannot be read: Weights only load failed",
    ),
    "a schedule with a command": (
        stored("scheduler.pt", Command()),
        "scheduler.pt cannot be read: Weights only load failed",
    ),
    "random states with a command": (
        stored("rng_state.pth", Command()),
        "rng_state.pth cannot be read: Weights only load failed",
    ),
    "a pickle in place of a file of torch": (
        written("scheduler.pt", pickle.dumps({"last_epoch": 2})),
        "scheduler.pt is cut off",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_another_checkpoint_is_taken(saved, name):
    fault, text = FAULTS[name]
    fault(saved / "checkpoint-2")
    with pytest.warns(UserWarning, match=f"checkpoint-2 is passed over: {text}.*; resuming from"):
        run = resume(saved)
    assert run.state.global_step == 3
    assert not os.path.exists("/tmp/metafocus-was-run")


@pytest.mark.parametrize("name", FAULTS)
def test_alone_it_is_one_line(saved, name):
    fault, text = FAULTS[name]
    fault(saved / "checkpoint-2")
    with pytest.raises(DataError, match=f"checkpoint-2' cannot be resumed: {text}") as found:
        resume(saved, str(saved / "checkpoint-2"))
    assert "\n" not in str(found.value) and len(str(found.value)) < 600


def test_a_tied_head_is_not_missed(saved, caplog):
    """transformers warns of it at every resume of such a model."""
    resume(saved)
    assert "missing keys" not in caplog.text


def test_a_model_with_parametrizations_of_its_own_resumes(tmp_path):
    """Their tensors have names of their own, which are no names of shards."""

    def run(resume):
        model = tiny(torch.float32, tie_word_embeddings=False)
        torch.nn.utils.parametrizations.weight_norm(model.lm_head)
        made = trainer(model, tmp_path, max_steps=2, **SAVING)
        made.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole = run(None)
    shutil.rmtree(tmp_path / "checkpoint-2")
    resumed = run(str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


# --- full disks --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 700 KiB: room for two checkpoints and not for three."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no file system can be mounted: {error}")
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(small_disk):
    folder = small_disk / "run"
    run = trainer(tiny(torch.float32), folder, max_steps=8, **SAVING)
    with pytest.raises(DataError, match=r"checkpoint-3: No space left on device. What lies"):
        run.train()
    left = sorted(folder.glob("*"))
    assert left and [damage(path) for path in left] == [None] * len(left)
    # With room again, the same command goes on.
    for path in left[:-1]:
        shutil.rmtree(path)
    again = trainer(tiny(torch.float32), folder, max_steps=8, save_total_limit=1, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8


# --- paths -------------------------------------------------------------------------------------


def test_a_path_that_is_not_utf8_is_refused_at_the_start(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/r\xffn")
    with pytest.raises(DataError, match=r"output_dir='.*r\\udcffn' is not UTF-8"):
        trainer(tiny(), name)
    chats = write(tmp_path / "chats.jsonl", *map(chat, range(8)))
    assert r"--output_dir='" in refused(*training(chats, name))
    other = shutil.copy(chats, os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    assert "is not UTF-8" in refused(*training(other, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.glob("*out*")) == []
