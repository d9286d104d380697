"""`metafocus train`, from flags and files to a checkpoint, and what it says to bad ones."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commands import (
    chat,
    read_json,
    refused,
    report,
    run,
    settings,
    train,
    training,
    tree,
    write,
    written,
)
from trainer_script import mean_answer_loss
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

import metafocus as mf
from metafocus.cli import chats as cli_chats
from metafocus.cli.outcome import _inner_warning
from metafocus.cli.settings import parse
from metafocus.cli.train import main
from metafocus.data import encode_chats, read_chats, stdlib_qa
from metafocus.errors import DataError
from metafocus.lm.hf import checkpointing
from metafocus.trainer.names import ESTIMATORS

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "examples" / "configs" / "qwen2.5-7b-focusft.yaml"
SFT = {"method": "sft", "lora_rank": None, "layer_fraction": None}
SAVED = {
    "all_results.json",
    "chat_template.jinja",
    "config.json",
    "eval_results.json",
    "generation_config.json",
    "metafocus.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "train_results.json",
    "trainer_state.json",
    "training_args.bin",
}
# Stands for what a test of the command's settings never reaches.
GIVEN = ["--train_file", "chats.jsonl", "--output_dir", "run", *("--use_cpu", "true")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def chats(folder) -> Path:
    return write(folder / "chats.jsonl", *[chat(i, 1 + i % 2) for i in range(10)])


@pytest.fixture(scope="module")
def base(folder, chats) -> Path:
    """A checkpoint of `train` with its defaults, small."""
    train(chats, folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def first(base) -> dict:
    return report(base)


def column(found: dict, name: str) -> list[float]:
    return [entry[name] for entry in found["history"]]


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_a_file_and_flags_after_it(tmp_path, name):
    path = written(tmp_path, settings(tmp_path, inner_lr=0.5, lora_modules="up_proj"), name)
    found = parse([path, "--inner_lr", "0.25", "--learning_rate", "3e-4", "--packing"])
    args = found.args
    assert (args.inner_lr, args.learning_rate, args.lora_modules) == (0.25, 3e-4, "up_proj")
    assert found.data.packing and found.data.max_length == 64 and args.max_steps == 2
    assert (args.inner_steps, args.lora_rank) == (2, 2)
    assert {"inner_lr", "packing", "max_length"} <= found.given
    assert not {"inner_steps", "optim"} & found.given


def test_texts_for_numbers_in_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    # YAML 1.1 reads this number as text.
    path.write_text("learning_rate: 1e-5\nresume_from_checkpoint: true\n")
    args = parse([str(path), *GIVEN]).args
    assert (args.learning_rate, args.resume_from_checkpoint) == (1e-5, "true")


def test_alpha_is_twice_the_rank_that_is_given():
    """The scale of fast weights, `alpha / rank`, stays that of the paper for every rank."""

    def scale(*words: str) -> float:
        adapter = parse([*GIVEN, *words]).args.adapter(torch.nn.Linear(1, 1))
        assert isinstance(adapter, mf.LoRA)
        return adapter.scale

    assert scale() == scale("--lora_rank", "4") == 2.0
    assert scale("--lora_rank", "4", "--lora_alpha", "3") == 0.75


def test_defaults_of_ours_count():
    args = parse(GIVEN).args
    assert args.logging_steps == 10 and args.remove_unused_columns is False


MEANT = {
    "--data": "train_file",
    "--model": "model_name_or_path",
    "--output": "output_dir",
    "--steps": "max_steps",
    "--epochs": "num_train_epochs",
    "--lr": "learning_rate",
    "--batch-size": "per_device_train_batch_size",
    "--heldout": "validation_file",
    "--rank": "lora_rank",
    "--alpha": "lora_alpha",
    "--modules": "lora_modules",
    "--target_modules": "lora_modules",
    "--attn": "attn_implementation",
    "--layers": "num_hidden_layers",
    "--overwrite": "overwrite_output_dir",
    "--device": "use_cpu",
    "--warmup_ratio": "warmup_steps",
    "--evaluation_strategy": "eval_strategy",
    "--inner-lr": "inner_lr",
    "--Inner_LR": "inner_lr",
    "--inner_stepz": "inner_steps",
    "--learning_rat": "learning_rate",
}


@pytest.mark.parametrize("flag", MEANT)
def test_a_foreign_or_misspelt_flag_is_refused_with_the_right_one(flag):
    error = refused("train", flag, "3", *GIVEN)
    meant = f"unknown flag {flag}, did you mean --{MEANT[flag]}?"
    assert error == f"{meant} (see metafocus train --help)"


def test_a_foreign_setting_in_a_file_too(tmp_path):
    path = written(tmp_path, {"lr": 1e-3, "zigzag": 1, "inner_stepz": 3})
    with pytest.raises(DataError) as caught:
        parse([path])
    assert str(caught.value).removeprefix(f"{path}: ") == (
        "unknown setting inner_stepz, did you mean inner_steps?; unknown setting lr, did you mean "
        "learning_rate?; unknown setting zigzag (see metafocus train --help)"
    )


BAD = {
    "zigzag": "",
    "--lora_rank 4 --trainer": r"unknown flag --trainer \(see",
    "--config run.yaml": "comes first, without a flag",
    "--inner_step 3": r"unknown flag --inner_step, did you mean --inner_steps",
    "--mask zigzag": r"mask='zigzag' is unknown: use one of causal, prefix-lm",
    "--estimator magic": r"estimator='magic' is unknown: use one of first-order",
    "--method dpo": r"method='dpo' is unknown: use one of focusft, sft",
    "--attn_implementation flash": r"attn_implementation='flash' is unknown",
    "--layer_fraction 1.5": r"fraction=1.5",
    "--layer_fraction nan": r"fraction=nan",
    "--lora_modules ,": r"names=\(\)",
    "--max_steps many": r"--max_steps: invalid int value: 'many'",
    "--per_device_train_batch_size 0": r"per_device_train_batch_size must be >= 1, got 0",
    "--max_length 1": r"max_length must be >= 2, got 1",
    "--learning_rate fast": r"--learning_rate: invalid float value: 'fast'",
    "--learning_rate -1": r"learning_rate must be a finite number >= 0",
    "--inner_lr -1": r"inner_lr must be finite and >= 0, got -1",
    "--inner_clip 0": r"inner_clip must be finite and > 0, got 0",
    "--inner_steps -1": r"inner_steps must be finite and >= 0, got -1",
    "--lora_rank 0": r"lora_rank must be finite and >= 1, got 0",
    "--lora_alpha inf": r"lora_alpha must be finite and > 0, got inf",
    "--num_hidden_layers 0": r"num_hidden_layers must be >= 1, got 0",
    "--hidden_size 0": r"hidden_size must be >= 64, got 0",
    "--vocab_size 10": r"vocab_size must be >= 259, got 10",
    "--outer_lora_rank -1": r"outer_lora_rank must be >= 0, got -1",
    "--validation_split_percentage 100": r"must be at least 0 and below 100, got 100",
    "--max_train_samples 0": r"max_train_samples must be >= 1, got 0",
    "--stdlib_turns 0": r"stdlib_turns must be >= 1, got 0",
    "--dataset_name words": r"train_file and dataset_name are both given",
    "--resume_from_checkpoint nowhere": r"'nowhere' cannot be resumed: it is not a directory",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_settings_are_refused_before_anything_slow(tmp_path, chats, words, monkeypatch):
    def slow(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr("metafocus.cli.options.model_and_tokenizer", slow)
    error = refused(*training(chats, tmp_path / "out"), *words.split())
    assert re.search(BAD[words] or "unexpected words: zigzag", error), error
    assert not (tmp_path / "out").exists()


def test_what_is_missing():
    assert refused("train").startswith("--output_dir is missing")
    assert refused("train", "--output_dir", "run").startswith("--train_file is missing")


def test_the_papers_configuration(tmp_path):
    values = yaml.safe_load(CONFIG.read_text())
    # Sharding and bfloat16 need the GPUs; the rest must be understood here.
    sharded = ("fsdp", "fsdp_config", "bf16", "report_to", "gradient_checkpointing")
    assert set(sharded) <= set(values)
    kept = {k: v for k, v in values.items() if k not in sharded}
    model, data, args, _ = parse([written(tmp_path, kept), *("--use_cpu", "true")])
    assert model.model_name_or_path == "Qwen/Qwen2.5-7B" and data.max_length == 4096
    assert (args.inner_steps, args.inner_lr, args.inner_clip) == (2, 1.0, 1.0)
    assert (args.lora_rank, args.lora_alpha, args.layer_fraction) == (32, 64.0, 0.35)
    assert (args.learning_rate, args.weight_decay, args.num_train_epochs) == (1e-5, 0.01, 5)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 32
    assert args.get_warmup_steps(100) == 10 and args.seed == 1234


# --- a run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(folder) -> dict[str, dict]:
    """Both methods on questions about the standard library."""
    common = {"max_train_samples": 12, "max_length": 256, "vocab_size": 512, "max_steps": 6}
    return {
        method: train("stdlib", folder / method, method=method, **common)
        for method in ("sft", "focusft")
    }


@pytest.mark.parametrize("method", ["sft", "focusft"])
def test_checkpoint_is_a_plain_one(folder, questions, method):
    directory = folder / method
    assert {path.name for path in directory.iterdir()} == SAVED
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    assert type(model) is Qwen2ForCausalLM
    untouched = Qwen2ForCausalLM(AutoConfig.from_pretrained(directory))
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert not [key for key in read_json(directory / "config.json") if "metafocus" in key]

    question = [{"role": "user", "content": "What does math.sqrt do?"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, ids["input_ids"].shape[1] + 4)


@pytest.mark.parametrize("method", ["sft", "focusft"])
def test_report_tells_the_loss_of_the_checkpoint_as_loaded(folder, questions, method):
    found = questions[method]
    model, tokenizer = mf.models.load(folder / method)
    made = {"split": "heldout", "n": 8, "context_tokens": 256 - 96, "seed": 42}
    samples = encode_chats(stdlib_qa.generate(tokenizer, **made), tokenizer, max_length=256).samples
    expected = mean_answer_loss(model, samples)
    assert found["heldout_loss_after"]["deployed"] == pytest.approx(expected, rel=1e-5)
    assert found["heldout_loss_after"]["deployed"] < found["heldout_loss_before"]["deployed"]


def test_report(folder, questions):
    sft, focusft = questions["sft"], questions["focusft"]
    assert set(sft["heldout_loss_before"]) == {"deployed"}
    assert set(focusft["heldout_loss_before"]) == {"deployed", "training mask"}
    assert (sft["mask"], sft["estimator"]) == ("causal", None)
    assert (focusft["mask"], focusft["estimator"]) == ("context-bidirectional", "first-order")
    assert focusft["steps"] == 6 and focusft["settings"]["lora_rank"] == 2
    assert focusft["environment"]["dtype"] == "float32" and focusft["seconds"] > 0
    assert len(sft["history"]) == len(focusft["history"]) == 6
    assert not [key for key in sft["history"][0] if "inner" in key]
    assert all(entry["inner_loss_last"] > 0 for entry in focusft["history"])
    results = read_json(folder / "focusft" / "eval_results.json")
    assert results["eval_deployed_loss"] == focusft["heldout_loss_after"]["deployed"]
    logged = read_json(folder / "focusft" / "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in logged if "eval_loss" in entry] == [0, 6]


def test_what_it_prints(tmp_path, chats):
    ran = run(*training(chats, tmp_path / "out", disable_tqdm=False))
    lines = ran.out.splitlines()
    starts = [line.split(":")[0] for line in lines[:4]]
    assert starts == ["fast weights in 3 modules", "train", "held out", "held-out loss before"]
    number = r"\d+\.\d{4}"
    assert re.fullmatch(
        rf"held-out loss {number} -> {number} \(deployed\), {number} -> {number} "
        rf"\(training mask\); 3 steps in \d+ s; saved in {tmp_path / 'out'}",
        lines[4],
    )
    assert len(lines) == 5 and "{" not in ran.out
    assert "3/3" in ran.err and "loss=" in ran.err and "inner=" in ran.err
    silent = run(*training(chats, tmp_path / "silent"))
    assert "3/3" not in silent.err and silent.out.count("{'loss'") == 3


def test_parquet_gives_the_same_as_json_lines(folder, chats, first):
    pq.write_table(pa.Table.from_pylist(read_chats(chats)), folder / "chats.parquet")
    found = train(folder / "chats.parquet", folder / "parquet")
    assert found["history"] == first["history"]
    assert found["heldout_loss_after"] == first["heldout_loss_after"]


def test_a_validation_file(folder, chats, first):
    # As many words as the training data has, so that the tokenizer is the same.
    heldout = write(folder / "heldout.jsonl", chat(4), chat(5))
    ran = run(*training(chats, folder / "held", validation_file=heldout))
    assert ran.code == 0
    assert "train: 10 samples" in ran.out and "held out: 2 samples" in ran.out
    found = report(folder / "held")
    assert found["heldout_loss_before"] != first["heldout_loss_before"]
    model, tokenizer = mf.models.load(folder / "held")
    samples = encode_chats(read_chats(heldout), tokenizer, max_length=64).samples
    expected = mean_answer_loss(model, samples)
    assert found["heldout_loss_after"]["deployed"] == pytest.approx(expected, rel=1e-5)


def test_a_tenth_is_held_out_by_itself(folder, base, first, chats):
    assert set(first["heldout_loss_before"]) == {"deployed", "training mask"}
    records = read_chats(chats)
    for percentage, count in ((10, 1), (50, 5), (0.1, 1), (99, 9)):
        kept, held = cli_chats.split(records, percentage, seed=3)
        assert len(held) == count and len(kept) == 10 - count
        assert sorted(map(str, [*kept, *held])) == sorted(map(str, records))
    assert cli_chats.split(records, 50, 1) == cli_chats.split(records, 50, 1)
    assert cli_chats.split(records, 50, 1) != cli_chats.split(records, 50, 2)
    assert cli_chats.split(records, 0, 1) == (records, [])


def test_nothing_held_out(tmp_path, chats):
    ran = run(*training(chats, tmp_path / "out", validation_split_percentage=0))
    assert "training loss" in ran.out.splitlines()[-1] and "held out" not in ran.out
    found = report(tmp_path / "out")
    assert found["heldout_loss_before"] is found["heldout_loss_after"] is None


def test_the_most_samples(tmp_path, chats):
    ran = run(*training(chats, tmp_path / "out", max_train_samples=3, max_eval_samples=2,
                        validation_split_percentage=50))  # fmt: skip
    assert "train: 3 samples" in ran.out and "held out: 2 samples" in ran.out


def test_a_data_set_by_name(tmp_path, chats, first):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    shutil.copy(chats, tmp_path / "set" / "train.jsonl")
    write(tmp_path / "set" / "validation.jsonl", chat(4), chat(5))
    ran = run(*training(None, tmp_path / "out", dataset_name=tmp_path / "set"))
    assert ran.code == 0, ran.err
    assert "train: 10 samples" in ran.out and "held out: 2 samples" in ran.out
    words = training(None, tmp_path / "no", dataset_name=tmp_path / "nowhere")
    assert "nowhere' cannot be loaded: " in refused(*words)
    write(tmp_path / "other.jsonl", {"note": "hi"})
    (tmp_path / "texts").mkdir()
    (tmp_path / "other.jsonl").rename(tmp_path / "texts" / "train.jsonl")
    ran = run(*training(None, tmp_path / "no", dataset_name=tmp_path / "texts"))
    assert ran.code == 2 and "texts, train, row 1: no messages, only note" in ran.err


def test_same_seed_same_run(folder, chats, first):
    again = train(chats, folder / "again")
    for key in ("history", "heldout_loss_before", "heldout_loss_after"):
        assert again[key] == first[key]
    assert (folder / "again/model.safetensors").read_bytes() == (
        folder / "base/model.safetensors"
    ).read_bytes()


CHANGES = {
    "seed": 5,
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 3,
    "max_length": 40,
    "mask": "causal",
    "inner_steps": 3,
    "inner_lr": 0.1,
    "inner_clip": 0.1,
    "inner_tokens": "context",
    "layer_fraction": 1.0,
    "lora_modules": "up_proj",
    "lora_rank": 3,
    "lora_alpha": 1.0,
    "validation_split_percentage": 30,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "vocab_size": 290,
    "per_example": True,
    "adaptation_seed": 1,
    # A bidirectional system message and a bidirectional question are not one context block.
    "separate_messages": True,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_something(tmp_path, chats, first, name):
    found = train(chats, tmp_path / "out", **{name: CHANGES[name]})
    assert found["settings"][name] == CHANGES[name]
    assert column(found, "loss") != column(first, "loss")


def test_steps_and_epochs(tmp_path, chats):
    found = train(chats, tmp_path / "out", max_steps=None, num_train_epochs=2)
    # Nine chats in batches of two, twice.
    assert len(found["history"]) == found["steps"] == 10


@pytest.mark.parametrize(
    ("method", "mask"), [("sft", "full"), ("sft", "context-bidirectional"), ("focusft", "causal")]
)
def test_masks(tmp_path, chats, method, mask):
    found = train(chats, tmp_path / "out", method=method, mask=mask)
    assert found["mask"] == mask
    assert set(found["heldout_loss_after"]) == (
        {"deployed"} if mask == "causal" else {"deployed", "training mask"}
    )


@pytest.mark.usefixtures("float64")
def test_estimators(tmp_path, chats):
    # In float64 but for the norms, which transformers computes in float32; a large alpha makes the
    # estimators differ more.
    changes = {"lora_alpha": 64}
    first = train(chats, tmp_path / "first", **changes)
    found = {
        word: train(chats, tmp_path / word, estimator=word, **changes)
        for word in ESTIMATORS
        if word != "implicit-cg"
    }
    with pytest.warns(mf.errors.NotStationaryWarning):
        implicit = train(chats, tmp_path / "implicit-cg", estimator="implicit-cg", **changes)
    found["implicit-cg"] = implicit
    # The same outer loss at first, but other gradients: their norms tell the estimators apart.
    norms = {word: column(run, "grad_norm")[0] for word, run in found.items()}
    for other in found.values():
        assert column(other, "loss")[0] == pytest.approx(column(first, "loss")[0], rel=1e-6)
    assert found["first-order"]["history"] == first["history"]
    # In float32 this model's first step is too steep for 1e-5 on every processor.
    same = {"unrolled-recompute": 1e-14, "unrolled-forward": 1e-7, "unrolled-finite": 0.05}
    for word, norm in norms.items():
        off = abs(norm / norms["unrolled"] - 1)
        assert off < same[word] if word in same else off > 0.1 or word == "unrolled", (word, off)


def test_no_fast_weights_is_plain_fine_tuning(tmp_path, chats):
    none = train(chats, tmp_path / "none", layer_fraction=0)
    plain = train(chats, tmp_path / "plain", mask="context-bidirectional", **SFT)
    assert column(none, "loss") == column(plain, "loss")
    assert column(none, "grad_norm") == column(plain, "grad_norm")


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("method", ["sft", "first-order", "unrolled"])
def test_gradient_checkpointing_gives_the_same_losses(tmp_path, chats, method, monkeypatch):
    calls, real = [], checkpointing.checkpoint_layer

    def counted(*args):
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(checkpointing, "checkpoint_layer", counted)
    changes = SFT if method == "sft" else {"estimator": method}
    plain = train(chats, tmp_path / "plain", **changes)
    assert not calls
    found = train(chats, tmp_path / "check", gradient_checkpointing=True, **changes)
    # Rounding of the norms in float32, which three steps of training make a hundred times larger.
    assert column(found, "grad_norm")[0] == pytest.approx(column(plain, "grad_norm")[0], rel=1e-7)
    assert column(found, "loss") == pytest.approx(column(plain, "loss"), rel=1e-6)
    assert column(found, "grad_norm") == pytest.approx(column(plain, "grad_norm"), rel=1e-5)
    assert found["heldout_loss_after"] == pytest.approx(plain["heldout_loss_after"], rel=1e-6)
    assert calls


def test_eager_attention_gives_the_same_losses(tmp_path, chats, first):
    found = train(chats, tmp_path / "eager", attn_implementation="eager")
    for name in ("loss", "grad_norm"):
        assert column(found, name)[0] == pytest.approx(column(first, name)[0], rel=1e-4)
    assert found["heldout_loss_before"] == pytest.approx(first["heldout_loss_before"], rel=1e-5)


def test_continue_from_a_checkpoint(tmp_path, chats, base, first):
    found = train(chats, tmp_path / "more", model_name_or_path=base)
    assert found["heldout_loss_before"] == pytest.approx(first["heldout_loss_after"], rel=1e-6)
    assert {path.name for path in (tmp_path / "more").iterdir()} == SAVED
    assert (tmp_path / "more/tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    # In place: the directory that is read is the one that is written.
    here = tmp_path / "here"
    shutil.copytree(base, here)
    again = train(chats, here, model_name_or_path=here, overwrite_output_dir=True)
    assert again["history"] == found["history"]


def test_a_bfloat16_checkpoint_is_trained_in_float32(tmp_path, chats, base):
    half = tmp_path / "half"
    shutil.copytree(base, half)
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(half)
    found = train(chats, tmp_path / "out", model_name_or_path=half, learning_rate=1e-6)
    assert found["environment"]["dtype"] == "float32"
    before = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    # Smaller than bfloat16 could tell.
    moved = (after[name] - before[name]).abs()
    assert (moved > 0).float().mean() > 0.9 and moved.max() < 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_packed_and_with_an_outer_lora(tmp_path):
    config = written(tmp_path, settings(tmp_path, packing=True, outer_lora_rank=2, max_length=128))
    found = main([config])
    assert len(found.train_dataset) < 8 and "document_ids" in found.train_dataset[0]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_from_a_file_to_a_checkpoint_and_on(tmp_path):
    config = written(tmp_path, settings(tmp_path, evaluate_on="prompt"))
    begun = main([config, "--max_steps", "1"])
    assert begun.state.global_step == 1
    before = report(tmp_path / "run")["heldout_loss_before"]
    assert set(before) == {"deployed", "training mask", "as evaluated"}
    done = main([config, "--resume_from_checkpoint", "true"])
    assert done.state.global_step == 2
    assert [e["step"] for e in done.state.log_history if "loss" in e] == [1, 2]
    # The first measurement is that of the model before any step, made by the first process.
    assert report(tmp_path / "run")["heldout_loss_before"] == before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert not [key for key in model.state_dict() if "lora" in key]
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template


# --- directories -----------------------------------------------------------------------------


def test_overwrite(tmp_path, chats, base):
    output = tmp_path / "out"
    shutil.copytree(base, output)
    (output / "notes.txt").write_text("mine")
    (output / "checkpoint-200").mkdir()
    before = tree(tmp_path)
    error = refused(*training(chats, output, seed=7))
    assert f"--output_dir {output} is not empty" in error and "--overwrite_output_dir" in error
    assert tree(tmp_path) == before
    train(chats, output, seed=7, overwrite_output_dir=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert (output / "model.safetensors").read_bytes() != before["out/model.safetensors"]
    # Else a later run would resume from a step of the one that was replaced.
    assert not (output / "checkpoint-200").exists()


def test_output_in_folders_that_do_not_exist(tmp_path, chats):
    train(chats, tmp_path / "a/b/c")
    (tmp_path / "empty").mkdir()
    train(chats, tmp_path / "empty")


def test_output_that_is_a_file(tmp_path, chats):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file/below"):
        error = refused(*training(chats, output))
        assert f"--output_dir {output}: {tmp_path / 'file'} is a file" in error
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.filterwarnings("ignore:The progress bar's postfix")
def test_training_that_diverges_saves_nothing(tmp_path, chats, base):
    shutil.copytree(base, tmp_path / "old")
    before = tree(tmp_path / "old")
    for name, changes in (("new", {}), ("old", {"overwrite_output_dir": True})):
        ran = run(*training(chats, tmp_path / name, learning_rate=1e12, **changes))
        assert ran.code == 2
        last = ran.err.splitlines()[-1]
        assert last.startswith("metafocus: error: ") and "nan" in last.lower()
    assert tree(tmp_path / "old") == before and tree(tmp_path / "new") == {}


def test_a_last_step_that_diverges_saves_nothing(tmp_path, chats):
    """The loss of no training step shows it, but the held-out one does."""
    ran = run(*training(chats, tmp_path / "out", learning_rate=1e30, max_steps=1))
    assert ran.code == 2
    assert "the held-out loss after training is " in ran.err.splitlines()[-1]
    assert tree(tmp_path / "out") == {}


def test_inner_steps_that_raise_the_loss_are_warned_of():
    shares = [
        {"last_step_rose": x, "inner_loss_first": 1.0, "inner_loss_last": 0.5} for x in (0, 1)
    ]
    assert "the last inner step raised the inner loss in 50%" in _inner_warning(shares)
    assert _inner_warning(shares[:1]) == _inner_warning([{"loss": 1.0}]) == ""
    # Where the inner loss scores other tokens, the loss after the last step is not known.
    other = [{"inner_loss_first": 1.0, "inner_loss_last": x} for x in (2.0, 0.5, 2.0)]
    assert _inner_warning(other[:2]) == ""
    assert "the inner loss rose in most steps" in _inner_warning([{"loss": 1.0}, *other])


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (2, "the last inner step raised the inner loss in "),
        (3, "the inner loss rose in most steps"),
    ],
)
def test_an_inner_rate_that_is_too_high_is_warned_of(tmp_path, chats, steps, text):
    changes = {"inner_lr": 1e4, "inner_clip": 1e4, "inner_steps": steps, "max_skipped": 100}
    ran = run(*training(chats, tmp_path / "out", **changes))
    assert ran.code == 0 and f"warning: {text}" in ran.out
    logged = read_json(tmp_path / "out" / "trainer_state.json")["log_history"]
    assert all(0 <= entry["last_step_rose"] <= 1 for entry in logged if "loss" in entry)


# --- data ------------------------------------------------------------------------------------

QUESTION = {"messages": [{"role": "user", "content": "Is anyone there?"}]}

BAD_DATA = {
    "broken JSON": ([chat(0), '{"messages": [', chat(1)], r"line 2: not JSON"),
    "no object": (["[1, 2]"], r"record 1: .*is not an object"),
    "no messages": ([chat(0), {"note": "hi"}], r"line 2: no messages, only note"),
    "unknown role": ([{"messages": [{"role": "bot", "content": "x"}]}], r"line 1: .*role='bot'"),
    "empty messages": ([chat(0), chat(1), {"messages": []}], r"line 3: messages is empty"),
    "no content": ([{"messages": [{"role": "user"}]}], r"line 1: .*no content"),
    "no answers": ([QUESTION] * 3, r"no answers at all"),
    "one chat": ([chat(0)], r"1 chat is not enough to hold one out: name --validation_file"),
    "no records": ([""], r"holds no record"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(tmp_path, name):
    records, message = BAD_DATA[name]
    data = write(tmp_path / "bad.jsonl", *records)
    before = tree(tmp_path)
    error = refused(*training(data, tmp_path / "out", strict=True))
    assert re.search(message, error), error
    assert tree(tmp_path) == before


def test_one_chat_with_others_held_out_is_enough(tmp_path, chats):
    data = write(tmp_path / "one.jsonl", chat(0))
    assert train(data, tmp_path / "out", validation_file=chats)["steps"] == 3


@pytest.mark.parametrize("setting", ["train_file", "validation_file"])
@pytest.mark.parametrize("name", ["missing.jsonl", "chats.csv", "folder.jsonl", "cut.parquet"])
def test_files_that_cannot_be_read(tmp_path, chats, setting, name):
    (tmp_path / "folder.jsonl").mkdir()
    for other in ("chats.csv", "cut.parquet"):
        (tmp_path / other).write_text("PAR1 but no more")
    before = tree(tmp_path)
    error = refused(*training(chats, tmp_path / "out", **{setting: tmp_path / name}))
    assert name in error
    assert tree(tmp_path) == before


UNUSED = {
    "stdlib_turns": (2, "without train_file stdlib"),
    "num_train_epochs": (3, "with max_steps"),
    "validation_split_percentage": (20, "with validation_file"),
    "estimator": ("unrolled", "with method sft"),
    "lora_rank": (3, "with method sft"),
    "vocab_size": (300, "with model_name_or_path"),
}


def test_settings_without_effect_are_noted(tmp_path, chats, base):
    values = {name: value for name, (value, _) in UNUSED.items()}
    more = {"validation_file": chats, "method": "sft", "model_name_or_path": base}
    ran = run(*training(chats, tmp_path / "out", **values, **more))
    assert ran.code == 0, ran.err
    for name, (_, why) in UNUSED.items():
        assert f"note: --{name} has no effect {why}." in ran.err
    assert "--inner_steps" not in ran.err


# --- the program -----------------------------------------------------------------------------


def program(*argv: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_as_a_program(tmp_path, chats):
    words = training(chats, tmp_path / "out", disable_tqdm=False)
    good = program("metafocus", *words)
    assert good.returncode == 0, good.stderr
    assert "held-out loss" in good.stdout and "Warning" not in good.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == SAVED
    bad = program("metafocus", *words)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("metafocus: error: --output_dir") and bad.stderr.count("\n") == 1


@pytest.mark.slow
def test_it_is_the_script_of_every_process(tmp_path, chats):
    """Two processes train as one with twice the accumulation, and save once."""
    changes = {"lora_alpha": 4.0, "per_device_train_batch_size": 1, "max_steps": 2}
    alone = train(chats, tmp_path / "alone", gradient_accumulation_steps=2, **changes)
    words = training(chats, tmp_path / "both", gradient_accumulation_steps=1, **changes)
    launch = ("torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone")
    ran = program(*launch, "-m", "metafocus", *words)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("saved in") == 1
    both = report(tmp_path / "both")
    # float32: sums in another order.
    assert column(both, "loss") == pytest.approx(column(alone, "loss"), rel=1e-4)
    for key in ("heldout_loss_before", "heldout_loss_after"):
        assert both[key] == pytest.approx(alone[key], rel=1e-4)
    assert {path.name for path in (tmp_path / "both").iterdir()} == SAVED


@pytest.mark.slow
def test_processes_that_share_sequences_are_one(tmp_path, chats):
    alone = train(chats, tmp_path / "alone", lora_alpha=4.0, max_steps=2)
    changes = {"lora_alpha": 4.0, "max_steps": 2, "sequence_parallel": 2}
    words = training(chats, tmp_path / "both", **changes)
    launch = ("torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone")
    ran = program(*launch, "-m", "metafocus", *words)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("saved in") == 1
    both = report(tmp_path / "both")
    # float32: sums in another order.
    assert column(both, "loss") == pytest.approx(column(alone, "loss"), rel=1e-4)
    for key in ("heldout_loss_before", "heldout_loss_after"):
        assert both[key] == pytest.approx(alone[key], rel=1e-4)


def test_help_begins_with_our_settings(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    places = [
        text.index(flag) for flag in ("\n  --train_file", "\n  --inner_lr", "\n  --adam_beta1")
    ]
    assert places == sorted(places)
