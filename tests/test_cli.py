"""The command line: `compare`, and what all commands share."""

from __future__ import annotations

import re

import pytest
import torch
from commands import SMALL, chat, flags, read_json, refused, run, train, tree, write

import metafocus as mf
from metafocus.__main__ import main
from metafocus.cli.parsing import suggestion

SIZES = flags(**SMALL)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "chats.jsonl"
    return write(path, *[chat(i, 1 + i % 2) for i in range(10)])


@pytest.fixture(scope="module")
def base(tmp_path_factory, chats):
    """A checkpoint of `train`, small."""
    folder = tmp_path_factory.mktemp("cli") / "base"
    train(chats, folder, max_steps=1)
    return folder


# --- compare ---------------------------------------------------------------------------------


def test_compare_writes_its_files(tmp_path):
    ran = run("compare", "--quick", "--output_dir", tmp_path / "a/b")
    assert ran.code == 0, ran.err
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {"compare.png", "compare.json"}
    assert (tmp_path / "a/b/compare.png").read_bytes().startswith(b"\x89PNG")
    found = read_json(tmp_path / "a/b/compare.json")
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [
        "first-order",
        "unrolled-last-1",
        "unrolled",
        "unrolled-recompute",
        "implicit-cg",
    ]
    assert found["reference"] == "unrolled" and found["environment"]["dtype"] == "float32"
    for name, row in rows.items():
        assert name in ran.out and row["verdict"] in ran.out
        assert row["seconds"] > 0 and row["peak_bytes"] > 0
    assert rows["unrolled"]["relative_error"] == 0
    assert rows["unrolled-recompute"]["relative_error"] < 1e-4
    assert rows["first-order"]["relative_error"] > 1e-2
    assert rows["unrolled-recompute"]["gradient_evaluations"] == 4
    assert rows["implicit-cg"]["hvp_evaluations"] == 11
    # 3 layers of 64, the tied embedding of 512 and the norms.
    assert "Qwen2ForCausalLM with 181,056 parameters" in ran.out


def test_compare_over_inner_rates(tmp_path):
    words = flags(inner_lr="1e3,0.1", inner_clip=1e3, estimators="first-order", output_dir=tmp_path)
    ran = run("compare", "--quick", *words)
    assert ran.code == 0, ran.err
    assert {path.name for path in tmp_path.iterdir()} == {
        "compare.png",
        "pareto.png",
        "compare.json",
    }
    found = read_json(tmp_path / "compare.json")
    assert found["over"] == {"solver.lr": [1000.0, 0.1]}
    assert [row["solver.lr"] for row in found["rows"]] == [1000.0, 0.1]
    assert [row["last_step_rose"] for row in found["rows"]] == [True, False]
    assert "the last inner step raised the inner loss at solver.lr = 1000.0\n" in ran.out
    assert "must be a positive number" in refused("compare", *flags(inner_lr="1.0,x"))


def test_compare_over_axes_and_seeds_goes_on(tmp_path):
    words = flags(estimators="first-order,unrolled", seeds=2, cells=tmp_path / "cells")
    over = ["--over", "solver.steps=1,2"]
    ran = run("compare", "--quick", "--num_hidden_layers", 1, *words, *over)
    assert ran.code == 0, ran.err
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.json")}
    # Two numbers of steps, two seeds, two estimators.
    assert len(kept) == 8 and "±" in ran.out and "over solver.steps, 2 seeds" in ran.out
    more = ["--over", "solver.steps=1,2,0"]
    words[words.index("first-order,unrolled")] = "first-order"
    ran = run("compare", "--quick", "--num_hidden_layers", 1, *words, *more)
    assert ran.code == 0, ran.err
    assert len(list((tmp_path / "cells").glob("*.json"))) == 10
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_compare_a_model_on_a_file_in_float64(tmp_path, chats, base):
    words = flags(
        max_length=64,
        per_device_train_batch_size=2,
        estimators="unrolled,unrolled-forward",
        reference="first-order",
        dtype="float64",
        train_file=chats,
        model_name_or_path=base,
        output_dir=tmp_path,
    )
    ran = run("compare", "--quick", *words)
    assert ran.code == 0, ran.err
    found = read_json(tmp_path / "compare.json")
    assert found["environment"]["dtype"] == "float64"
    full, forward = (row["relative_error"] for row in found["rows"])
    assert full > 1e-2 and forward == pytest.approx(full, rel=1e-6)
    assert "float64" in ran.out and "batch [2, " in ran.out
    assert "hypergradients against FirstOrder" in ran.out


@pytest.mark.slow
def test_compare_with_central_differences_over_tasks(tmp_path):
    words = flags(
        estimators="first-order,unrolled",
        reference="central-differences",
        # 32 parameters: each takes many inner loops, as the norms compute in float32.
        outer_parameters=r"k_proj\.bias",
        output_dir=tmp_path,
        **{"num_hidden_layers": 1, "inner_steps": 1, "dtype": "float64", "over": "tasks=2"},
    )
    ran = run("compare", "--quick", *words)
    assert ran.code == 0, ran.err
    found = read_json(tmp_path / "compare.json")
    assert found["over"] == {"tasks": [2]} and found["reference"] == "central differences"
    errors = {row["name"]: row["relative_error"] for row in found["rows"]}
    known = found["rows"][0]["reference_error"]
    assert known < 1e-2 and errors["unrolled"] <= 2 * known < errors["first-order"]
    assert "batch [2, 1, " in ran.out and "known to a relative error of" in ran.out


def test_compare_passes_its_options_on(monkeypatch, chats):
    seen = {}

    def compare(problem, outer, episode, **kwargs):
        seen.update(kwargs, batch=episode.support["input_ids"].shape[0])
        first, second = (problem.init(outer, episode.support) for _ in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first)
        seen["ranks"] = {v.shape[0] for k, v in first.items() if k.endswith("lora_A")}
        return mf.Comparison([], "it")

    monkeypatch.setattr("metafocus.cli.compare.compare", compare)
    words = flags(
        **{"repeats": 5, "inner_steps": 3, "inner_lr": 0.5, "lora_rank": 3},
        **{"per_device_train_batch_size": 4, "reference": "unrolled", "estimators": "first-order"},
    )
    ran = run("compare", "--train_file", chats, *SIZES, *words)
    assert ran.code == 0, ran.err
    assert seen["repeats"] == 5 and seen["batch"] == 4 and seen["ranks"] == {3}
    assert seen["solver"].lr == 0.5 and seen["solver"].steps == 3
    assert seen["estimators"] == {"first-order": mf.FirstOrder()}
    assert seen["reference"] == mf.Unrolled()


BAD_COMPARE = {
    "--estimators first-order,magic": r"estimators='magic' is unknown: use one of first-order",
    "--estimators ,": r"--estimators is empty: use some of first-order",
    "--reference magic": r"reference='magic' is unknown: use one of central-differences, first",
    "--reference central-differences": r"six inner loops for each of the [0-9,]+ outer parameters",
    "--outer_parameters zigzag": r"'zigzag' matches none of the model's parameters, such as model",
    "--outer_parameters (": r"'\(' is not a regular expression",
    "--over tasks=0": r"tasks must be an integer >= 1",
    "--over tasks=1,6 --per_device_train_batch_size 2 --train_file {chats}": r"2 times 6 tasks is",
    "--mask zigzag": r"mask='zigzag' is unknown",
    "--over solver.zigzag=1": r"over: nothing has the field 'solver.zigzag'. Use tasks",
    "--over solver.steps": r"--over 'solver.steps': write FIELD=VALUE,VALUE",
    "--over solver.clip=none": r"'none' is not a number, None, True or False",
    "--over lr=1,2 --inner_lr 1,2": r"use one of both",
    "--seeds 6 --per_device_train_batch_size 2 --train_file {chats}": r"times --seeds 6 is more",
    "--repeats 0": r"--repeats: must be a whole number >= 1",
    "--per_device_train_batch_size 0": r"_size: must be a whole number >= 1, got 0",
    "--per_device_train_batch_size -2": r"_size: must be a whole number >= 1, got -2",
    "--per_device_train_batch_size 11 --train_file {chats}": r"_size 11 is more than the 10 chats",
    "--max_length 20": r"stdlib with --max_length 20: .*cannot hold the evidence",
    "--train_file missing.jsonl": r"missing.jsonl",
    "--dtype float16": r"--dtype: invalid choice",
    "--layer_fraction 2": r"fraction=2.0",
    "--lora_modules zero_proj": r"zero_proj",
    "--output_dir {chats}": r"chats.jsonl is a file",
    "--inner_lr 1e30 --train_file {chats}": r"reference hypergradient \(unrolled\) is not finite",
}


@pytest.mark.parametrize("words", BAD_COMPARE)
def test_bad_compare(tmp_path, chats, base, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused("compare", "--quick", *words.format(chats=chats, base=base).split())
    assert re.search(BAD_COMPARE[words], error), error
    assert tree(tmp_path) == {}


def test_quick_leaves_what_was_asked_for():
    words = "--num_hidden_layers 2 --estimators first-order --reference first-order".split()
    ran = run("compare", "--quick", "--per_device_train_batch_size", 3, *words)
    assert ran.code == 0, ran.err
    # 2 layers of 64 are 37,568 fewer than 3 in 181,056.
    assert "with 131,648 parameters" in ran.out and "batch [3, " in ran.out


# --- the program -----------------------------------------------------------------------------

COMMANDS = ["train", "compare", "profile", "doctor", "eval", "reproduce"]


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == mf.__version__


def shown(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main([*words, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help(capsys):
    out = shown(capsys)
    assert all(f"    {command}" in out for command in COMMANDS)


@pytest.mark.parametrize("command", ["train", "compare", "profile", "eval"])
def test_commands_share_their_flags(capsys, command):
    out = shown(capsys, command)
    common = "model_name_or_path attn_implementation output_dir seed".split()
    if command != "eval":
        common += "train_file max_length vocab_size mask inner_steps inner_lr inner_clip".split()
        common += "layer_fraction lora_rank lora_alpha lora_modules".split()
    for name in common:
        assert f"--{name} " in out, name
    # One way to write a flag.
    assert not re.findall(r"--\w+-\w+", out.replace("--nproc-per-node", ""))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "required: COMMAND"),
        (("tune",), "invalid choice: 'tune'"),
        (("tain",), "unknown command 'tain', did you mean train?"),
        (("profile",), "required: --output_dir"),
        (("eval",), "required: --suite"),
    ],
)
def test_incomplete_commands(argv, message):
    error = refused(*argv)
    assert message in error and "--help" in error


MEANT = {
    "compare --data x": "--data, did you mean --train_file?",
    "compare --batch-size 2": "--batch-size, did you mean --per_device_train_batch_size?",
    "compare --inner-lr 2": "--inner-lr, did you mean --inner_lr?",
    "compare --estimator unrolled": "--estimator, did you mean --estimators?",
    "profile --out x": "--out, did you mean --output_dir?",
    "profile --rank 2": "--rank, did you mean --lora_rank?",
    "profile --validation_file x": "--validation_file, did you mean --train_file?",
    "eval --model x": "--model, did you mean --model_name_or_path?",
    "eval --batch_size 2": "--batch_size, did you mean --per_device_eval_batch_size?",
    "eval --max_tokens 2": "--max_tokens, did you mean --max_new_tokens?",
    "eval --tol": "--tol ",
}


@pytest.mark.parametrize("words", MEANT)
def test_a_foreign_or_misspelt_flag_is_refused_with_the_right_one(words):
    """Before a required one is missed."""
    assert refused(*words.split()).startswith(f"unknown flag {MEANT[words]}")


def test_nothing_is_suggested_that_a_command_has_not():
    assert suggestion("batch_size", ["per_device_eval_batch_size"]) == "per_device_eval_batch_size"
    assert suggestion("batch_size", ["learning_rate"]) is None
