"""`metafocus train --dry_run`: three steps are measured, and nothing stays."""

from __future__ import annotations

import re

import pytest
from commands import chat, run, training, tree, write

from metafocus.cli.dry_run import _duration, planned_steps, shortened
from metafocus.cli.settings import parse
from metafocus.trainer import FocusTrainer


@pytest.fixture
def chats(tmp_path):
    return write(tmp_path / "chats.jsonl", *map(chat, range(8)))


def dry(chats, tmp_path, **changes):
    ran = run(*training(chats, tmp_path / "run", **changes), "--dry_run")
    assert ran.code == 0, ran.err
    return ran.out


def test_it_prints_time_and_memory_and_writes_nothing(chats, tmp_path):
    before = tree(tmp_path)
    out = dry(chats, tmp_path, max_steps=50)
    assert tree(tmp_path) == before
    assert re.search(r"^time +\d+\.\d\d s with the longest samples, \d+\.\d\d s", out, re.M)
    assert re.findall(r"^measured step (\d) of 3: \d+\.\d\d s", out, re.M) == ["1", "2", "3"]
    assert re.search(r"^run +50 steps: about \d", out, re.M)
    # AdamW holds two numbers for each weight, and each weight is trained.
    pattern = r"^tensors +(\S+) MB weights, (\S+) MB gradients, (\S+) MB optimiser"
    weights, gradients, state = map(float, re.findall(pattern, out, re.M)[0])
    assert 0 < weights == gradients
    # Both are rounded to 0.1 MB.
    assert state == pytest.approx(2 * weights, abs=0.2)
    (peak,) = re.findall(r"^peak +([\d,]+) MB in this process", out, re.M)
    assert float(peak.replace(",", "")) > weights + gradients + state


def test_nothing_is_evaluated(chats, tmp_path, monkeypatch):
    """Whatever asks for it; held-out chats are not even encoded."""

    def evaluates(self, *args, **kwargs):
        raise AssertionError("evaluated")

    monkeypatch.setattr(FocusTrainer, "evaluate", evaluates)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    out = dry(chats, tmp_path, validation_file=chats, **settings, **best)
    assert "held out" not in out


def test_a_directory_with_a_run_in_it_is_left_alone(chats, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metafocus.json").write_text("{}")
    before = tree(tmp_path)
    dry(chats, tmp_path)
    assert tree(tmp_path) == before


def arguments(*words):
    given = "--train_file f --output_dir run --use_cpu --per_device_train_batch_size 2"
    return parse([*given.split(), *words]).args


def samples(*lengths):
    return [{"input_ids": [0] * length} for length in lengths]


def lengths(found):
    return [len(sample["input_ids"]) for sample in found]


def test_the_longest_samples_come_first():
    args = arguments("--gradient_accumulation_steps", "2")
    found = shortened(samples(*range(1, 13)), args)
    assert lengths(found) == [12, 11, 10, 9, 12, 11, 10, 9, 8, 7, 6, 5]
    assert args.max_steps == 3


def test_few_samples_are_taken_several_times():
    found = shortened(samples(5, 3), arguments("--gradient_accumulation_steps", "2"))
    assert lengths(found) == [5, 3, 5, 3] * 3


def test_the_steps_of_the_whole_run():
    data = samples(*[4] * 9)
    assert planned_steps(data, arguments("--max_steps", "7")) == 7
    # Five batches of two an epoch.
    assert planned_steps(data, arguments("--num_train_epochs", "3")) == 15


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 seconds"), (120, "2.0 minutes"), (9000, "2.5 hours"), (2e5, "2.3 days")],
)
def test_durations(seconds, text):
    assert _duration(seconds) == text
