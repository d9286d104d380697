"""Commands under torchrun share their work, and write what one process writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from metafocus.cli.shares import ALONE, Ranks, refuse_ranks
from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError
from metafocus.evals import builtin_prose

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")


def started(*words: str, ranks: bool) -> subprocess.CompletedProcess[str]:
    program = TORCHRUN if ranks else (sys.executable,)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*program, "-m", "metafocus", *words],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(builtin_prose("train").sentences[:600], 1500)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.slow
def test_eval_asks_each_question_once(model, tmp_path):
    words = ["eval", "--suite", "babilong", "--tasks", "qa1,qa2", "--lengths", "0k",
             "--num_questions", "5", "--model_name_or_path", model, "--output_dir"]  # fmt: skip
    alone = started(*words, str(tmp_path / "alone"), ranks=False)
    assert alone.returncode == 0, alone.stderr
    # What a process of a killed run has left is taken over, and not asked again.
    answers = (tmp_path / "alone" / "answers.jsonl").read_text()
    left = tmp_path / "pair" / "answers.rank1.jsonl"
    left.parent.mkdir()
    first = json.loads(answers.splitlines()[0])
    left.write_text(json.dumps({**first, "output": "of the killed run"}) + "\n")
    pair = started(*words, str(left.parent), ranks=True)
    assert pair.returncode == 0, pair.stderr
    found = [json.loads(line) for line in (left.parent / "answers.jsonl").read_text().splitlines()]
    want = [json.loads(line) for line in answers.splitlines()]
    assert found[0]["output"] == "of the killed run" and found[1:] == want[1:]
    assert sorted(path.name for path in left.parent.iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )
    # Printed once.
    assert pair.stdout.count("10 answers in") == 1


@pytest.mark.slow
def test_profile_gives_each_process_some_masks(model, tmp_path):
    words = ["profile", "--max_train_samples", "2", "--max_length", "256",
             "--model_name_or_path", model, "--output_dir"]  # fmt: skip
    reports = []
    for ranks in (False, True):
        folder = tmp_path / str(ranks)
        done = started(*words, str(folder), ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("means over layers") == 1
        reports.append(json.loads((folder / "profile.json").read_text())["profiles"])
    assert reports[0] == reports[1] and len(reports[0]) == 2


def test_shares_are_disjoint_and_whole():
    items = list(range(7))
    parts = [Ranks(rank, 3).mine(items) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == items
    assert ALONE.mine(items) == items and ALONE.gathered(4) == [4] and ALONE.first


def test_what_is_not_shared_is_refused(monkeypatch):
    refuse_ranks("compare")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="metafocus compare would do the same work in each of 2"):
        refuse_ranks("compare")


def test_every_process_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Ranks(1, 2).device("cuda") == "cuda:1"
    assert Ranks(1, 2).device("cpu") == "cpu" and ALONE.device("cuda") == "cuda"
