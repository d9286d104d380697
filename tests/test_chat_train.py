"""`metafocus train` with the formats, templates and chats that people have."""

from __future__ import annotations

import json

import pytest
import torch
from commands import chat, refused, run, train, training, write

from metafocus.data.tokenizer import CHATML

SFT = {
    "method": "sft",
    "lora_rank": None,
    "layer_fraction": None,
    "max_steps": 1,
    "validation_split_percentage": 0,
}
BAD = {"messages": [{"role": "robot", "content": "a"}]}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    return write(folder / "chats.jsonl", *[chat(i) for i in range(6)], BAD)


def test_chats_that_cannot_be_encoded(tmp_path, chats):
    ran = run(*training(chats, tmp_path / "out", **SFT))
    assert ran.code == 0, ran.err
    assert "train: 6 samples" in ran.out
    assert f"1 records were skipped:\n  {chats}, line 7: message 0: role='robot' is" in ran.out
    found = refused(*training(chats, tmp_path / "no", strict=True, **SFT))
    assert found.startswith(f"{chats}, line 7: message 0: role='robot' is unknown")


def test_a_template_and_its_variables(tmp_path):
    records = [chat(i) for i in range(4)]
    data = tmp_path / "array.json"
    data.write_text(json.dumps(records))
    template = tmp_path / "own.jinja"
    template.write_text("{{ 'tone ' + tone }}" + CHATML)
    more = {"chat_template": template, "encoding_cache": tmp_path / "kept", **SFT}
    words = training(data, tmp_path / "out", **more, chat_template_kwargs='{"tone": "kind"}')
    ran = run(*words)
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template.read_text()
    (kept,) = (tmp_path / "kept").iterdir()
    assert len(torch.load(kept)["sizes"]) == 4
    assert "'tone' is undefined" in refused(*training(data, tmp_path / "no", **more))
    missing = training(data, tmp_path / "no", **{**more, "chat_template": tmp_path / "none"})
    assert "--chat_template" in refused(*missing) and "No such file" in refused(*missing)


def test_each_answer_is_a_sample(tmp_path):
    records = [{"messages": chat(i)["messages"] * 2} for i in range(3)]
    data = write(tmp_path / "chats.jsonl", *records)
    ran = run(*training(data, tmp_path / "out", turns="each", max_length=128, **SFT))
    assert "train: 6 samples" in ran.out, ran.err


def test_texts_without_a_template(tmp_path):
    data = write(tmp_path / "texts.jsonl", *[{"text": f"hello {i}"} for i in range(4)])
    assert train(data, tmp_path / "out", **SFT)["steps"] == 1


def test_a_data_set_in_a_stream(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", *[chat(i) for i in range(9)])
    write(tmp_path / "set" / "test.jsonl", chat(4), chat(5))
    more = {"dataset_name": tmp_path / "set", "dataset_streaming": True, "max_train_samples": 3}
    ran = run(*training(None, tmp_path / "out", **more, **SFT))
    assert "train: 3 samples" in ran.out and "held out: 2 samples" in ran.out, ran.err
    words = training(None, tmp_path / "no", **more, dataset_test_split="dev", **SFT)
    assert "has no split named dev, only train, test: pass --dataset_test_split" in refused(*words)


def test_only_the_splits_that_are_used_are_read(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", *[chat(i) for i in range(3)])
    write(folder / "validation.jsonl", chat(4))
    # A split without any good record must not stop a run that does not use it.
    write(folder / "test.jsonl", BAD)
    own = write(tmp_path / "own.jsonl", chat(5), chat(6))
    for more, held in (({}, 1), ({"validation_file": own, "dataset_test_split": "test"}, 2)):
        words = training(None, tmp_path / f"out{held}", dataset_name=folder, **more, **SFT)
        ran = run(*words)
        assert f"held out: {held} samples" in ran.out, ran.err
    assert "note: --dataset_test_split has no effect with validation_file" in ran.err


def test_flags_of_a_data_set_without_one(tmp_path, chats):
    ran = run(*training(chats, tmp_path / "out", dataset_streaming=True, **SFT))
    assert "note: --dataset_streaming has no effect without dataset_name" in ran.err


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"turns": "all"}, "turns='all' is unknown: use one of as_rendered, last, each"),
        ({"chat_template_kwargs": "{"}, "is not JSON"),
        ({"chat_template_kwargs": "[]"}, "is not a JSON object"),
        ({"dataset_num_proc": 0}, "dataset_num_proc must be >= 1, got 0"),
        (
            {"eval_strategy": "steps", "eval_steps": 1},
            "--eval_strategy steps has nothing to evaluate on: name --validation_file FILE",
        ),
        ({"enable_thinking": "false"}, "did you mean --chat_template_kwargs"),
    ],
)
def test_refusals(tmp_path, chats, changes, text):
    assert text in refused(*training(chats, tmp_path / "out", **{**SFT, **changes}))
