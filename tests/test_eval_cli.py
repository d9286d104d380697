"""`metafocus eval`, from words to files, and the batched answers under it."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from metafocus.__main__ import main
from metafocus.cli import evaluate
from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError
from metafocus.evals import babilong, builtin_prose, ruler
from metafocus.evals.agentic import pass_at_k
from metafocus.evals.intervals import wilson
from metafocus.evals.results import cells
from metafocus.evals.run import answers, prompt_text


def words(text):
    return len(text.split())


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(builtin_prose("train").sentences[:600], 1500)


def build(tokenizer):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["eval", *map(str, argv)])
    return code, out.getvalue(), err.getvalue()


def refused(*argv):
    code, out, err = run(*argv)
    # A model's loading bar may stand before it.
    last = err.splitlines()[-1]
    assert code == 2 and not out and last.startswith("metafocus: error: ")
    return last


def test_batches_answer_as_one_prompt_alone_does(tokenizer):
    """Against argmax without cache, padding or `generate`."""
    model = build(tokenizer).double()
    # A checkpoint's own settings must not show.
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 2.0
    model.train()
    items = [
        *babilong.generate(words, task="qa1", length=0, n=3),
        *ruler.generate(words, task="vt", length=250, n=2),
        *babilong.generate(words, task="qa2", length=0, n=2),
    ]
    seen = []
    found = answers(
        model, tokenizer, items, batch_size=3, each=lambda batch: seen.append(len(batch))
    )
    assert sum(seen) == 7 and max(seen) <= 3 and model.training
    model.eval()
    for item, text in zip(items, found, strict=True):
        ids = tokenizer.encode(prompt_text(item, tokenizer), return_tensors="pt")
        start = ids.shape[1]
        with torch.no_grad():
            for _ in range(item.new_tokens):
                new = model(ids).logits[0, -1].argmax()
                if new == tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, new.view(1, 1)], 1)
        assert text == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert len(set(found)) > 1


def test_the_prompt_ends_with_the_start_of_the_answer(tokenizer):
    (item,) = ruler.generate(words, task="niah_single_1", length=300, n=1)
    text = prompt_text(item, tokenizer)
    assert text.endswith(f"<|im_start|>assistant\n{item.answer_prefix}")
    chat = tokenizer.apply_chat_template(item.chat()["messages"], tokenize=False)
    assert chat.startswith(text)  # training and evaluation show the same


def test_bad_settings(tokenizer):
    with pytest.raises(DataError, match=r"batch_size must be.*got 0"):
        answers(build(tokenizer), tokenizer, [], batch_size=0)


@pytest.mark.parametrize(
    ("suite", "tasks", "lengths", "drawn"),
    [
        ("babilong", "qa1,qa4", "0k,1k", True),
        ("ruler", "niah_single_2,vt,fwe", "600", True),
        ("ruler", "fwe", "600", False),
    ],
)
def test_a_run(checkpoint, tmp_path, suite, tasks, lengths, drawn):
    out = tmp_path / "out"
    words = (
        "--model_name_or_path",
        checkpoint,
        "--suite",
        suite,
        "--tasks",
        tasks,
        "--lengths",
        lengths,
    )
    code, text, err = run(*words, "--n", 3, "--per_device_eval_batch_size", 2, "--output_dir", out)
    assert code == 0, err
    assert "repeats" not in err
    report = json.loads((out / "eval.json").read_text())
    sizes = [0, 1024] if suite == "babilong" else [600]
    found = [(c["task"], c["length"]) for c in report["cells"]]
    assert found == [(task, size) for task in tasks.split(",") for size in sizes]
    names = {"babilong_official", "lm_eval_substring"} if sizes[0] == 0 else {"string_match_all"}
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * len(found) and all("prompt" not in line for line in lines)
    for cell in report["cells"]:
        own = [x for x in lines if (x["task"], x["length"]) == (cell["task"], cell["length"])]
        assert cell["scores"].keys() == names and len(own) == 3
        for name, score in cell["scores"].items():
            mean = sum(x["scores"][name] for x in own) / 3
            assert score["mean"] == pytest.approx(mean) and score["n"] == 3
            assert [score["low"], score["high"]] == pytest.approx(wilson(mean, 3))
            assert name in text
    assert (out / "depths.png").exists() == drawn == ("depths.png" in text)
    if drawn:
        assert (out / "depths.png").read_bytes().startswith(b"\x89PNG")
    again = (*words, "--n", 3, "--output_dir", out)
    assert "pass --overwrite_output_dir" in refused(*again)
    assert run(*again, "--overwrite_output_dir", "--per_device_eval_batch_size", 3)[0] == 0
    second = (out / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["question"] for line in second] == [x["question"] for x in lines]


@pytest.mark.parametrize(("suite", "lengths"), [("babilong", "1k"), ("ruler", "1k,2k")])
def test_right_answers_score_100(checkpoint, tmp_path, monkeypatch, suite, lengths):
    def right(model, tokenizer, items, *, each, **settings):
        for item in items:
            size = len(tokenizer.encode(prompt_text(item, tokenizer))) + item.new_tokens
            assert size <= item.length
        each({i: item.answer.removeprefix(item.answer_prefix) for i, item in enumerate(items)})

    monkeypatch.setattr(evaluate, "answers", right)
    out = tmp_path / "out"
    record = {"question": "Who?", "answers": ["Nobody"], "documents": ["Nobody it was."]}
    (tmp_path / "qa.jsonl").write_text(json.dumps(record) + "\n")
    words = ["--model_name_or_path", checkpoint, "--suite", suite, "--lengths", lengths, "--n", 4]
    if suite == "babilong":
        words += ["--tasks", ",".join(babilong.TASKS)]
    if suite == "ruler":
        words += ["--questions", tmp_path / "qa.jsonl"]
    code, _, err = run(*words, "--noise", "all", "--output_dir", out)
    assert code == 0, err
    report = json.loads((out / "eval.json").read_text())
    tasks = babilong.TASKS if suite == "babilong" else ruler.TASKS
    assert {cell["task"] for cell in report["cells"]} == set(tasks)
    for cell in report["cells"]:
        if cell["task"] == "qa7":  # the official scorer finds "one" in "none"
            assert cell["scores"]["lm_eval_substring"]["mean"] == 1
            continue
        assert all(score["mean"] == 1 for score in cell["scores"].values())
        shown = [part for part in cell["by_depth"] if part is not None]
        assert all(part[0] == 1 for part in shown)
        assert bool(shown) == (cell["task"] not in ("cwe", "fwe"))
    sizes = [1024, 2048] if suite == "ruler" else [1024]
    assert [row["length"] for row in report["averages"]] == sizes
    assert all(row["tasks"] == len(tasks) for row in report["averages"])
    assert report["effective_length"] == sizes[-1]


def test_noise_that_repeats_is_named(checkpoint, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("This is the only sentence that this short book has to offer to us.")
    words = ("--model_name_or_path", checkpoint, "--suite", "babilong", "--tasks", "qa4", "--n", 1)
    code, _, err = run(*words, "--lengths", "1k", "--noise", book, "--output_dir", tmp_path / "out")
    assert code == 0 and "note: --noise has 14 words and repeats" in err


def test_scores_are_of_the_answers_given():
    items = babilong.generate(words, task="qa1", length=0, n=4)
    wrong = [f"Nowhere. {item.answer}" for item in items]
    official, substring = cells(items, wrong)[0].scores
    assert (official.scorer, official.mean) == ("babilong_official", 0.0)
    assert (substring.scorer, substring.mean) == ("lm_eval_substring", 1.0)


def test_bad_words(checkpoint, tmp_path):
    base = ("--model_name_or_path", checkpoint, "--output_dir", tmp_path / "out")
    ruled, babi = (*base, "--suite", "ruler"), (*base, "--suite", "babilong")
    assert "tasks='qa21' is unknown: use one of qa1" in refused(*babi, "--tasks", "qa21")
    assert "--tasks is empty" in refused(*babi, "--tasks", ",")
    assert "needs --questions" in refused(*ruled, "--tasks", "qa")
    assert "'4kb' is not a length" in refused(*ruled, "--lengths", "4kb")
    assert "0k is for BABILong only" in refused(*ruled, "--lengths", "0k")
    assert "more than the 2048 positions" in refused(*ruled, "--lengths", "4k")
    assert "length=50 cannot hold the facts" in refused(*babi, "--tasks", "qa1", "--lengths", "50")
    assert "is not a file" in refused(*babi, "--noise", tmp_path / "none.txt")
    assert "cannot be loaded" in refused(
        "--model_name_or_path",
        tmp_path / "none",
        "--suite",
        "ruler",
        "--output_dir",
        tmp_path / "out",
    )
    assert not (tmp_path / "out").exists()


def test_science(checkpoint, tmp_path):
    out = tmp_path / "out"
    words = (
        "--model_name_or_path",
        checkpoint,
        "--suite",
        "science",
        "--n",
        4,
        "--max_new_tokens",
        12,
    )
    code, text, err = run(*words, "--samples", 3, "--k", "1,3", "--output_dir", out)
    assert code == 0, err
    report = json.loads((out / "eval.json").read_text())
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [(x["question"], x["sample"]) for x in lines] == [
        (i, j) for i in range(4) for j in range(3)
    ]
    counts = [sum(x["correct"] for x in lines if x["question"] == i) for i in range(4)]
    for k, rate in report["pass_at_k"].items():
        assert rate["mean"] == pytest.approx(sum(pass_at_k(3, c, int(k)) for c in counts) / 4)
        assert [rate["low"], rate["high"]] == pytest.approx(wilson(rate["mean"], 4))
    assert report["pass_at_k"].keys() == {"1", "3"} and report["questions"] == 4
    assert report["settings"]["temperature"] == 0.7 and report["settings"]["samples"] == 3
    assert report["tool_limits"]["seconds"] == 10 and report["tool_walls"]["system_calls"]
    assert sum(report["ended"].values()) == 12 and "pass@k" in text
    assert "Python" in lines[0]["messages"][0]["content"]
    assert "pass --overwrite_output_dir" in refused(*words, "--output_dir", out)
    code, _, err = run(
        *words, "--samples", 1, "--temperature", 0, "--no_tool", "--output_dir", out,
        "--overwrite_output_dir",
        "--lengths", "1k",
    )  # fmt: skip
    assert code == 0 and "--lengths has no effect with --suite science" in err
    report = json.loads((out / "eval.json").read_text())
    assert report["tool_limits"] is report["tool_walls"] is None
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert "Python" not in lines[0]["messages"][0]["content"] and len(lines) == 4


def test_gpqa(checkpoint, tmp_path):
    names = ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    rows = [",".join(names), *(f"Question {i}?,r,a,b,c" for i in range(5))]
    (tmp_path / "gpqa.csv").write_text("\n".join(rows))
    base = ("--model_name_or_path", checkpoint, "--suite", "gpqa", "--output_dir", tmp_path / "out")
    words = (*base, "--gpqa_file", tmp_path / "gpqa.csv", "--max_new_tokens", 4, "--samples", 1)
    assert run(*words)[0] == 0
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert run(*words, "--n", 2, "--overwrite_output_dir")[0] == 0
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 2
    other = (*base[:-1], tmp_path / "none")
    assert "needs --gpqa_file FILE.csv" in refused(*other)
    assert "is not a file" in refused(*other, "--gpqa_file", tmp_path / "none.csv")
    assert "alike" in refused(*other, "--temperature", 0, "--samples", 2)
    assert "--k '1,5': give whole numbers from 1" in refused(*other, "--k", "1,5")
    assert "--top_p" in refused(*other, "--top_p", -1)
    assert not (tmp_path / "none").exists()


def test_longbench(checkpoint, tmp_path):
    records = [
        {
            "question": f"What is {i}?",
            **{f"choice_{letter}": f"{letter.lower()} {i}" for letter in "ABCD"},
            "answer": "ABCD"[i % 4],
            "context": f"It is the text of number {i}.",
            "domain": "Made up" if i < 3 else "Other",
            "difficulty": "easy",
        }
        for i in range(5)
    ]
    base = ("--model_name_or_path", checkpoint, "--suite", "longbench", "--samples", 1)
    words = (*base, "--no_tool", "--max_new_tokens", 4)
    for name, text in (
        ("data.json", json.dumps(records)),
        ("data.jsonl", "\n".join(map(json.dumps, records))),
    ):
        (tmp_path / name).write_text(text)
        out = tmp_path / f"out-{name}"
        ran = run(*words, "--longbench_file", tmp_path / name, "--output_dir", out)
        assert ran[0] == 0, ran[2]
        lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        assert [line["reference"] for line in lines] == list("ABCDA")
        first = lines[1]["messages"][0]["content"]
        assert "<text>\nIt is the text of number 1.\n</text>" in first and "(D) d 1" in first
        topics = json.loads((out / "eval.json").read_text())["by_topic"]
        assert {k: v["questions"] for k, v in topics.items()} == {
            "Made up / easy": 3,
            "Other / easy": 2,
        }
    other = (*base, "--output_dir", tmp_path / "none")
    assert "needs --longbench_file" in refused(*other)
    (tmp_path / "bad.json").write_text('[{"question": "?"}]')
    bad = refused(*other, "--longbench_file", tmp_path / "bad.json")
    assert "record 1: KeyError 'choice_A'" in bad


@pytest.mark.parametrize(("suite", "tasks"), [("nolima", "onehop,twohop_inverted"), ("helmet", "")])
def test_needles_and_keys(checkpoint, tmp_path, monkeypatch, suite, tasks):
    def right(model, tokenizer, items, *, each, **settings):
        each({i: item.answer.removeprefix(item.answer_prefix) for i, item in enumerate(items)})

    monkeypatch.setattr(evaluate, "answers", right)
    words = ["--model_name_or_path", checkpoint, "--suite", suite, "--lengths", "1k,2k", "--n", 3]
    words += ["--tasks", tasks] if tasks else []
    code, text, err = run(*words, "--output_dir", tmp_path / "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert len(report["cells"]) == 2 * (2 if tasks else 1) and "mean of" in text
    assert all(cell["scores"]["string_match_all"]["mean"] == 1 for cell in report["cells"])
    assert report["effective_length"] is None  # neither suite defines it
    assert "0k is for BABILong only" in refused(*words[:6], "--lengths", "0k", "--output_dir", "o")


def test_export(checkpoint, tmp_path):
    tasks = tmp_path / "tasks"
    words = (
        "--model_name_or_path",
        checkpoint,
        "--suite",
        "babilong",
        "--tasks",
        "qa1,qa2",
        "--lengths",
    )
    code, text, err = run(*words, "0k,1k", "--n", 2, "--export", tasks)
    assert code == 0, err
    names = [
        f"metafocus_babilong_{task}_{size}" for task in ("qa1", "qa2") for size in ("0k", "1k")
    ]
    assert ",".join(names) in text and f"--include_path {tasks}" in text
    assert {p.stem for p in tasks.glob("*.yaml")} == {p.stem for p in tasks.glob("*.jsonl")}
    assert {p.stem for p in tasks.glob("*.yaml")} == set(names)
    assert not (tasks / "eval.json").exists()
    assert "--output_dir is missing" in refused(*words, "1k")
    code, _, err = run(*words, "0k", "--n", 1, "--samples", 2, "--output_dir", tmp_path / "out")
    assert code == 0 and "--samples has no effect with --suite babilong" in err
