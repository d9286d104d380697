"""Answers are kept as they come, and count only for the same question, prompt and settings."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from metafocus.errors import DataError
from metafocus.evals.asking import ask_all
from metafocus.evals.fingerprint import fingerprint
from metafocus.evals.journal import Journal


def key(i):
    return ("ruler", "vt", 4096, i)


def write(path, n, **settings):
    with Journal(path, settings) as journal:
        journal.add((key(i), f"prompt {i}", {"output": f"answer {i}\u20ac\n"}) for i in range(n))


def test_answers_are_read_again(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    write(path, 3, model="m")
    with Journal(path, {"model": "m"}) as journal:
        assert len(journal) == 3
        assert journal.get(key(1), "prompt 1")["output"] == "answer 1\u20ac\n"
        assert journal.get(key(1), "another prompt") is None  # the text or the code changed
        assert journal.get(key(3), "prompt 3") is None
        journal.add([(key(1), "another prompt", {"output": "new"})])
        assert journal.get(key(1), "another prompt")["output"] == "new"
        journal.finish([key(2), key(1)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["key"][3] for line in lines] == [2, 1] and lines[1]["output"] == "new"
    assert not path.with_name("answers.jsonl.lock").exists()


def test_every_answer_is_on_disk_before_the_next(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), real(fd)))
    path = tmp_path / "answers.jsonl"
    with Journal(path, {}) as journal:
        synced.clear()
        for i in range(3):
            journal.add([(key(i), "p", {})])
            assert synced[-1] == path.stat().st_size and len(synced) == i + 1


def test_a_line_that_a_kill_cut_off_is_dropped_at_every_byte(tmp_path):
    path = tmp_path / "answers.jsonl"
    write(path, 3)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for size in range(last, len(whole)):
        path.write_bytes(whole[:size])
        with Journal(path, {}) as journal:
            assert len(journal) == 2
            journal.add([(key(2), "prompt 2", {"output": "again"})])
        with Journal(path, {}) as journal:
            assert len(journal) == 3 and journal.get(key(2), "prompt 2")["output"] == "again"


def test_other_settings_are_refused_and_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    write(path, 2, model="m", seed=1)
    with (
        pytest.raises(DataError, match=r"2 answers .* other settings \(seed was 1, now 2\)"),
        Journal(path, {"model": "m", "seed": 2}),
    ):
        pass
    path.with_suffix(".settings.json").unlink()
    with pytest.raises(DataError, match="other settings: name another"), Journal(path, {}):
        pass
    with Journal(path, {"model": "m", "seed": 1}) as journal:  # the lock was released
        assert len(journal) == 2


@pytest.mark.parametrize("line", ["[]", "{}", '{"key": 3}', "x", '{"key": ["a", "b", "c", "d"]}'])
def test_files_of_another_kind_are_left_alone(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_text(line + "\n")
    try:
        with Journal(path, {}):
            pass
    except DataError as error:
        assert "answers.jsonl" in str(error)
    else:
        raise AssertionError("it was taken for answers")
    assert path.read_text() == line + "\n"


def test_one_evaluation_at_a_time(tmp_path):
    path = tmp_path / "answers.jsonl"
    with (
        Journal(path, {}),
        pytest.raises(DataError, match="being written by another evaluation"),
        Journal(path, {}),
    ):
        pass


def test_a_model_is_known_by_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(10_000_000))
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    weights.write_bytes(b"\1" * 10_000_000)
    assert fingerprint(tmp_path) != before
    weights.write_bytes(bytes(10_000_001))
    assert fingerprint(tmp_path) != before
    assert fingerprint(tmp_path / "none") is None


def test_training_that_changes_one_small_tensor_is_noticed(tmp_path):
    """Also one that lies between two of the blocks at equal distances."""
    sizes = {f"t{i}": 100_003 for i in range(40)} | {f"u{i}": 5 for i in range(40)}
    weights = {name: torch.zeros(size) for name, size in sizes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    found = {fingerprint(tmp_path)}
    for weight in weights.values():
        weight += 1
        save_file(weights, tmp_path / "model.safetensors")
        found.add(fingerprint(tmp_path))
    assert len(found) == 1 + len(weights)


def test_the_lock_of_the_next_evaluation_stays(tmp_path):
    path = tmp_path / "answers.jsonl"
    first = Journal(path, {})
    with first:
        pass
    with Journal(path, {}):
        first.close()  # once more: it holds nothing
        with pytest.raises(DataError, match="being written by another"), Journal(path, {}):
            pass


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_request_that_fails_does_not_stop_the_others(concurrency):
    def ask(i):
        if i in (2, 5):
            raise DataError(f"no reply to {i}")
        return -i

    kept = {}
    with pytest.raises(DataError, match=r"2 requests failed, the last with: no reply to"):
        ask_all(range(8), ask, kept.__setitem__, concurrency=concurrency)
    assert kept == {i: -i for i in (0, 1, 3, 4, 6, 7)}


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_server_that_is_gone_is_not_asked_on(concurrency):
    asked = []

    def ask(i):
        asked.append(i)
        raise DataError("gone")

    with pytest.raises(DataError, match="5 requests failed in a row"):
        ask_all(range(1000), ask, lambda i, result: None, concurrency=concurrency)
    assert len(asked) < 5 + 2 * concurrency
    with pytest.raises(DataError, match=r"concurrency must be.*got 0"):
        ask_all([1], ask, lambda i, result: None, concurrency=0)


def test_other_exceptions_stop_at_once():
    def ask(i):
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        ask_all([1, 2], ask, lambda i, result: None, concurrency=2)
