"""`metafocus attribute` from words to files, with scores checked by central differences."""

from __future__ import annotations

import json

import commands
import pytest
import torch

from metafocus import models


def chat(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


TRAIN = [chat(f"What is the name of animal number {i}?", f"It is {i * 7}.") for i in range(6)]
QUERY = [chat("What is the name of animal number 2?", "It is 14."), chat("Who | is it?", "Me.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("attribute")
    torch.manual_seed(0)
    texts = [m["content"] for c in (*TRAIN, *QUERY) for m in c["messages"]]
    model, tokenizer = models.small(texts, vocab_size=300, hidden_size=64, num_hidden_layers=2)
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    for name, chats in (("train", TRAIN), ("query", QUERY)):
        text = "".join(json.dumps(c) + "\n" for c in chats)
        (path / f"{name}.jsonl").write_text(text)
    return path


def words(folder, output, **changes):
    settings = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "train.jsonl",
        "query_file": folder / "query.jsonl",
        "output_dir": folder / output,
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 1.0,
        "lora_rank": 2,
        "dtype": "float64",
        **changes,
    }
    return ["attribute", *commands.flags(**settings)]


@pytest.fixture(scope="module")
def report(folder):
    ran = commands.run(*words(folder, "out", leave_one_out=6))
    assert ran.code == 0, ran.err
    return json.loads((folder / "out" / "attribution.json").read_text()), ran.out


def test_a_page_that_a_person_can_read(folder, report):
    found, out = report
    page = (folder / "out" / "attribution.md").read_text()
    assert page in out
    for i in range(2):
        best = min(range(6), key=lambda j: found["scores"][i][j])
        part = page.split(f"## Query {i}: ")[1]
        assert f"| {best} | {found['scores'][i][best]:+.2e} | What is the name" in part
    assert "Who / is it?" in page
    assert found["settings"]["max_steps"] == 4


def agreements(found):
    """For each query: how scores correlate with the changes of its loss without each chat."""
    left = found["leave_one_out"]
    changes = torch.tensor(left["losses"]).T - torch.tensor(found["losses"])[:, None]
    pairs = zip(changes, -torch.tensor(found["scores"]), strict=True)
    return [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs]


def test_scores_predict_leaving_one_out(report):
    found, _ = report
    assert found["leave_one_out"]["chats"] == list(range(6))
    # A chat is left out, which is far: the first order has the sign and about the size.
    assert min(agreements(found)) > 0.9
    assert min(found["leave_one_out"]["spearman"]) > 0.7


@pytest.fixture(scope="module")
def adam(folder):
    def by(rate):
        given = words(folder, f"adam_{rate}", optim="adam", learning_rate=rate, leave_one_out=6)
        ran = commands.run(*given)
        assert ran.code == 0, ran.err
        return json.loads((folder / f"adam_{rate}" / "attribution.json").read_text())

    return by


def test_scores_of_adam_at_a_small_rate_predict_leaving_one_out(adam):
    found = adam(0.001)
    assert min(agreements(found)) > 0.9
    assert min(found["leave_one_out"]["spearman"]) > 0.7


def test_scores_of_adam_at_a_rate_of_a_hundredth_do_not(adam, report):
    # The derivative is exact (test_training_runs.py), and leaving a chat out is too far for it.
    # docs/training_runs.md and --help say so.
    found = adam(0.01)
    assert min(agreements(found)) < 0.5 < min(agreements(report[0]))


def test_every_store_gives_the_same_scores(folder, report, tmp_path):
    for store in ("cpu", f"disk={tmp_path}", "schedule=2"):
        ran = commands.run(*words(folder, "stored", store=store))
        assert ran.code == 0, ran.err
        found = json.loads((folder / "stored" / "attribution.json").read_text())
        assert found["scores"] == report[0]["scores"]
    assert list(tmp_path.iterdir()) == []


def test_texts_have_scores_too(folder, tmp_path):
    texts = [{"text": f"animal | number {i}"} for i in range(3)]
    path = commands.write(tmp_path / "texts.jsonl", *texts)
    ran = commands.run(*words(folder, tmp_path / "texts", train_file=path, max_steps=2))
    assert ran.code == 0, ran.err
    assert "animal / number 2 |" in (tmp_path / "texts" / "attribution.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": "tape"}, "--store 'tape' is unknown: device, cpu, disk=DIR or schedule=SLOTS"),
        ({"store": "schedule=0"}, "--store 'schedule=0' is unknown"),
        ({"train_file": "stdlib"}, "are files of chats"),
        ({"query_file": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"max_length": 8}, "no answer"),
        ({"lora_modules": "nothing_here"}, "nothing_here"),
    ],
)
def test_what_is_refused(folder, changes, message):
    assert message in commands.refused(*words(folder, "refused", **changes))
    assert not (folder / "refused").exists()
