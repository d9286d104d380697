"""The command line, from words to files, and what it says to bad ones."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import metafocus as mf
from metafocus.__main__ import main
from metafocus.data import Collator, encode_chats, read_chats, stdlib_qa
from metafocus.lm.hf import checkpointing
from metafocus.trainer.words import ESTIMATORS, MASKS
from metafocus.training import History, evaluate

TINY = "--hidden-size 64 --layers 2 --vocab-size 320".split()
SHORT = "--max-length 64 --steps 3 --batch-size 2 --lr 3e-3 --rank 2 --layer-fraction 0.5".split()
SFT = "--method sft --max-length 64 --steps 3 --batch-size 2 --lr 3e-3".split()
SAVED = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "metafocus.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def run(*argv: object) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    return Ran(code, out.getvalue(), err.getvalue())


def train(data: object, output: Path, *more: object, model: tuple = (*TINY, *SHORT)) -> dict:
    """Run `metafocus train` well and return its report."""
    ran = run("train", "--data", data, "--output", output, *model, *more)
    assert ran.code == 0, ran.err
    assert f"saved: {output}" in ran.out
    return report(output)


def report(directory: Path) -> dict:
    return json.loads((directory / "metafocus.json").read_text(), parse_constant=refuse)


def refuse(word: str):
    raise AssertionError(f"{word} is not JSON")


def refused(*argv: object) -> str:
    """Run a command that must be refused and return its one line of error."""
    ran = run(*argv)
    assert ran.code == 2
    # transformers shows how far it is with loading.
    lines = [line for line in ran.err.split("\n") if line and "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("metafocus: error: "), ran.err
    return lines[0].removeprefix("metafocus: error: ")


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def chat(i: int, turns: int = 1) -> dict:
    messages = [{"role": "system", "content": "You count."}]
    for turn in range(turns):
        number = 3 * i + turn
        messages += [
            {"role": "user", "content": f"What follows {number}?"},
            {"role": "assistant", "content": f"{number + 1} follows."},
        ]
    return {"messages": messages}


def write(path: Path, *records: object) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cli")


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


@pytest.fixture(scope="module")
def questions(folder) -> dict[str, dict]:
    """Both methods on questions about the standard library."""
    common = (
        *"--hidden-size 64 --layers 3 --vocab-size 512 --max-length 256".split(),
        *"--samples 12 --steps 6 --batch-size 2 --lr 3e-3".split(),
    )
    extra = {"sft": (), "focusft": ("--rank", 4)}
    return {
        method: train("stdlib", folder / method, "--method", method, *more, model=common)
        for method, more in extra.items()
    }


# --- train -----------------------------------------------------------------------------------


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
    config = json.loads((directory / "config.json").read_text())
    assert not [key for key in config if "metafocus" in key or "lora" in key]

    question = [{"role": "user", "content": "What does math.sqrt do?"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, ids["input_ids"].shape[1] + 4)
    assert isinstance(tokenizer.decode(generated[0]), str)


@pytest.mark.parametrize("method", ["sft", "focusft"])
def test_report_tells_the_loss_of_the_checkpoint_as_loaded(folder, questions, method):
    found = questions[method]
    tokenizer = AutoTokenizer.from_pretrained(folder / method)
    model = AutoModelForCausalLM.from_pretrained(folder / method)
    records = stdlib_qa.generate(
        tokenizer, split="heldout", n=8, context_tokens=256 - 96, seed=1234
    )
    samples = encode_chats(records, tokenizer, max_length=256).samples
    collator = Collator(pad_token_id=tokenizer.pad_token_id)
    deployed = evaluate(model, samples, collator, mask=mf.masks.causal)
    assert found["heldout_loss_after"]["deployed"] == pytest.approx(deployed, rel=1e-5)
    assert found["heldout_loss_after"]["deployed"] != found["heldout_loss_before"]["deployed"]


def test_report(questions):
    sft, focusft = questions["sft"], questions["focusft"]
    assert set(sft["heldout_loss_before"]) == {"deployed"}
    assert set(focusft["heldout_loss_before"]) == {"deployed", "training mask"}
    assert (sft["mask"], sft["estimator"]) == ("causal", None)
    assert (focusft["mask"], focusft["estimator"]) == ("context-bidirectional", "first-order")
    assert len(sft["history"]["loss"]) == len(focusft["history"]["loss"]) == 6
    assert sft["history"]["inner_first"] == [None] * 6
    assert all(isinstance(x, float) for x in focusft["history"]["inner_last"])
    assert focusft["schedule"]["steps"] == 6 and focusft["settings"]["rank"] == 4
    assert focusft["environment"]["dtype"] == "float32"


def test_parquet_gives_the_same_as_json_lines(folder, chats, first):
    pq.write_table(pa.Table.from_pylist(read_chats(chats)), folder / "chats.parquet")
    found = train(folder / "chats.parquet", folder / "parquet")
    assert found["history"] == first["history"]
    assert found["heldout_loss_after"] == first["heldout_loss_after"]


def test_heldout_file(folder, chats, first):
    # As many words as the training data has, so that the tokenizer is the same.
    heldout = write(folder / "heldout.jsonl", chat(4), chat(5))
    ran = run("train", "--data", chats, "--heldout", heldout, "--output", folder / "held", *TINY,
              *SHORT)  # fmt: skip
    assert ran.code == 0
    assert "10 chats to train on, 2 held out" in ran.out
    found = report(folder / "held")
    assert found["heldout_loss_before"] != first["heldout_loss_before"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "held")
    model = AutoModelForCausalLM.from_pretrained(folder / "held")
    samples = encode_chats(read_chats(heldout), tokenizer, max_length=64).samples
    deployed = evaluate(model, samples, Collator(tokenizer.pad_token_id), mask=mf.masks.causal)
    assert found["heldout_loss_after"]["deployed"] == pytest.approx(deployed, rel=1e-5)


def test_heldout_fraction_splits_without_overlap(folder, chats):
    command = ("train", "--data", chats, *TINY, *SHORT)
    half = run(*command, "--output", folder / "half", "--heldout-fraction", 0.5)
    assert half.code == 0 and "5 chats to train on, 5 held out" in half.out
    few = run(*command, "--output", folder / "few", "--heldout-fraction", 0.01)
    assert few.code == 0 and "9 chats to train on, 1 held out" in few.out


def test_same_seed_same_report(folder, chats, first):
    again = train(chats, folder / "again")
    for key in ("history", "heldout_loss_before", "heldout_loss_after"):
        assert again[key] == first[key]
    assert (folder / "again/model.safetensors").read_bytes() == (
        folder / "base/model.safetensors"
    ).read_bytes()


CHANGES = {
    "--seed": 5,
    "--lr": 1e-4,
    "--batch-size": 3,
    "--max-length": 80,
    "--mask": "causal",
    "--estimator": "unrolled",
    "--inner-steps": 3,
    "--inner-lr": 0.1,
    "--inner-clip": 0.1,
    "--layer-fraction": 1.0,
    "--modules": "up_proj",
    "--rank": 3,
    "--alpha": 1.0,
    "--heldout-fraction": 0.3,
    "--hidden-size": 128,
    "--layers": 3,
    "--vocab-size": 290,
}


@pytest.mark.parametrize("option", CHANGES)
def test_every_option_changes_something(tmp_path, chats, first, option):
    found = train(chats, tmp_path / "out", option, CHANGES[option])
    assert found["settings"][option[2:].replace("-", "_")] == CHANGES[option]
    assert found["history"]["loss"] != first["history"]["loss"]


def test_separate_messages(tmp_path, chats, first):
    # A bidirectional system message and a bidirectional question are not one context block.
    found = train(chats, tmp_path / "out", "--separate-messages")
    assert found["history"]["loss"] != first["history"]["loss"]


def test_steps_and_epochs(tmp_path, chats):
    words = [w for w in SHORT if w not in ("--steps", "3")]
    found = train(chats, tmp_path / "out", "--epochs", 2, model=(*TINY, *words))
    # Nine chats in batches of two, twice.
    assert len(found["history"]["loss"]) == 9


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", ["sft", "focusft"])
def test_masks(tmp_path, chats, method, mask):
    words = SHORT if method == "focusft" else SFT
    found = train(chats, tmp_path / "out", "--mask", mask, model=(*TINY, *words))
    assert found["mask"] == mask
    assert set(found["heldout_loss_after"]) == (
        {"deployed"} if mask == "causal" else {"deployed", "training mask"}
    )


@pytest.mark.usefixtures("float64")
def test_estimators(tmp_path, chats):
    # In float64 but for the norms, which transformers computes in float32.
    first = train(chats, tmp_path / "first")
    found = {
        word: train(chats, tmp_path / word, "--estimator", word)["history"]
        for word in ESTIMATORS
        if word != "implicit-cg"
    }
    with pytest.warns(mf.errors.NotStationaryWarning):
        found["implicit-cg"] = train(chats, tmp_path / "implicit-cg", "--estimator", "implicit-cg")[
            "history"
        ]
    # The same outer loss at first, but other gradients: their norms tell the estimators apart.
    norms = {word: history["grad_norm"][0] for word, history in found.items()}
    for history in found.values():
        assert history["loss"][0] == pytest.approx(first["history"]["loss"][0], rel=1e-6)
    assert found["first-order"] == first["history"]
    # In float32 this model's first step is too steep for 1e-5 on every processor.
    same = {"unrolled-recompute": 1e-14, "unrolled-forward": 1e-7, "unrolled-finite": 0.05}
    for word, norm in norms.items():
        off = abs(norm / norms["unrolled"] - 1)
        assert off < same[word] if word in same else off > 0.1 or word == "unrolled", (word, off)


def test_no_fast_weights_is_plain_fine_tuning(tmp_path, chats):
    none = train(chats, tmp_path / "none", "--layer-fraction", 0)
    plain = train(chats, tmp_path / "plain", "--mask", "context-bidirectional", model=(*TINY, *SFT))
    assert none["history"] == plain["history"]


def counted(function, calls: list):
    def run(*args):
        calls.append(1)
        return function(*args)

    return run


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["sft", "first-order", "unrolled"])
def test_gradient_checkpointing_gives_the_same_losses(tmp_path, chats, method, monkeypatch):
    calls = []
    monkeypatch.setattr(
        checkpointing, "checkpoint_layer", counted(checkpointing.checkpoint_layer, calls)
    )
    words = SFT if method == "sft" else [*SHORT, "--estimator", method]
    plain = train(chats, tmp_path / "plain", model=(*TINY, *words))
    assert not calls
    found = train(chats, tmp_path / "check", "--gradient-checkpointing", model=(*TINY, *words))
    # Rounding of the norms in float32, which three steps of training make a hundred times larger.
    assert found["history"]["grad_norm"][0] == pytest.approx(
        plain["history"]["grad_norm"][0], rel=1e-7
    )
    assert found["history"]["loss"] == pytest.approx(plain["history"]["loss"], rel=1e-6)
    assert found["history"]["grad_norm"] == pytest.approx(plain["history"]["grad_norm"], rel=1e-5)
    assert found["heldout_loss_after"] == pytest.approx(plain["heldout_loss_after"], rel=1e-6)
    assert calls
    config = (tmp_path / "check/config.json").read_text()
    assert config == (tmp_path / "plain/config.json").read_text()


def test_eager_attention_gives_the_same_losses(tmp_path, chats, first):
    found = train(chats, tmp_path / "eager", "--attn", "eager")
    for key in ("loss", "grad_norm"):
        assert found["history"][key][0] == pytest.approx(first["history"][key][0], rel=1e-4)
    assert found["heldout_loss_before"] == pytest.approx(first["heldout_loss_before"], rel=1e-5)


def test_continue_from_a_checkpoint(tmp_path, chats, base, first):
    found = train(chats, tmp_path / "more", "--model", base, model=SHORT)
    assert found["heldout_loss_before"] == pytest.approx(first["heldout_loss_after"], rel=1e-6)
    assert {path.name for path in (tmp_path / "more").iterdir()} == SAVED
    assert (tmp_path / "more/tokenizer.json").read_text() == (base / "tokenizer.json").read_text()


def test_continue_in_place(tmp_path, chats, base):
    there, here = tmp_path / "there", tmp_path / "here"
    shutil.copytree(base, here)
    elsewhere = train(chats, there, "--model", base, model=SHORT)
    in_place = train(chats, here, "--model", here, "--overwrite", model=SHORT)
    assert in_place["history"] == elsewhere["history"]
    assert (here / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()


def test_a_bfloat16_checkpoint_is_trained_in_float32(tmp_path, chats, base):
    half = tmp_path / "half"
    shutil.copytree(base, half)
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(half)
    found = train(chats, tmp_path / "out", "--model", half, "--lr", 1e-6, model=SHORT)
    assert found["environment"]["dtype"] == "float32"
    before = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    # Smaller than bfloat16 could tell.
    moved = (after[name] - before[name]).abs()
    assert (moved > 0).float().mean() > 0.9 and moved.max() < 1e-5


def test_overwrite(tmp_path, chats, base):
    output = tmp_path / "out"
    shutil.copytree(base, output)
    (output / "notes.txt").write_text("mine")
    command = ("train", "--data", chats, *TINY, *SHORT, "--seed", 7, "--output", output)
    before = tree(tmp_path)
    assert "is not empty" in refused(*command)
    assert tree(tmp_path) == before
    assert run(*command, "--overwrite").code == 0
    assert (output / "notes.txt").read_text() == "mine"
    assert (output / "model.safetensors").read_bytes() != before["out/model.safetensors"]


def test_output_in_folders_that_do_not_exist(tmp_path, chats):
    train(chats, tmp_path / "a/b/c")
    (tmp_path / "empty").mkdir()
    train(chats, tmp_path / "empty")


@pytest.mark.parametrize(
    ("last", "noted"),
    [([2.0, 2.0, 0.5], True), ([2.0, 0.5, 0.5], False), ([1.0] * 3, False), ([None] * 3, False)],
)
def test_rising_inner_loss_is_noted(tmp_path, chats, monkeypatch, last, noted):
    first = [None if x is None else 1.0 for x in last]
    history = History([1.0] * 3, first, last, [1.0] * 3)
    monkeypatch.setattr("metafocus.cli.train.train", lambda *args: history)
    ran = run("train", "--data", chats, "--output", tmp_path / "out", *TINY, *SHORT)
    assert ran.code == 0
    assert ("note: the inner loss rose in most steps. Lower --inner-lr" in ran.out) is noted


def test_training_that_diverges_saves_nothing(tmp_path, chats, base):
    shutil.copytree(base, tmp_path / "old")
    before = tree(tmp_path)
    for extra in (("new",), ("old", "--overwrite")):
        output = tmp_path / extra[0]
        words = (*TINY, *SHORT, "--lr", 1e12, "--output", output, *extra[1:])
        ran = run("train", "--data", chats, *words)
        assert ran.code == 2
        last = ran.err.splitlines()[-1]
        assert last.startswith("metafocus: error: ") and "loss is nan" in last
    assert tree(tmp_path) == before


# --- bad input to train ----------------------------------------------------------------------

QUESTION = {"messages": [{"role": "user", "content": "Is anyone there?"}]}

BAD_DATA = {
    "broken JSON": ([chat(0), '{"messages": [', chat(1)], r"line 2: not JSON"),
    "no object": (["[1, 2]"], r"line 1: .*is not an object"),
    "no messages": ([chat(0), {"text": "hi"}], r"line 2: no messages, only text"),
    "unknown role": ([{"messages": [{"role": "bot", "content": "x"}]}], r"line 1: .*role='bot'"),
    "empty messages": ([chat(0), chat(1), {"messages": []}], r"line 3: messages is empty"),
    "no content": ([{"messages": [{"role": "user"}]}], r"line 1: .*no content"),
    "no answers": ([QUESTION] * 3, r"no answers at all"),
    "one chat": ([chat(0)], r"1 chat: at least 2 are needed .*--heldout FILE"),
    "no records": ([""], r"holds no record"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(tmp_path, name):
    records, message = BAD_DATA[name]
    data = write(tmp_path / "bad.jsonl", *records)
    before = tree(tmp_path)
    error = refused("train", "--data", data, "--output", tmp_path / "out", *TINY, *SHORT)
    assert re.search(message, error), error
    assert tree(tmp_path) == before


def test_one_chat_with_heldout_is_enough(tmp_path, chats):
    data = write(tmp_path / "one.jsonl", chat(0))
    found = train(data, tmp_path / "out", "--heldout", chats)
    assert len(found["history"]["loss"]) == 3


@pytest.mark.parametrize("option", ["--data", "--heldout"])
@pytest.mark.parametrize("name", ["missing.jsonl", "chats.csv", "folder.jsonl", "cut.parquet"])
def test_files_that_cannot_be_read(tmp_path, chats, option, name):
    (tmp_path / "folder.jsonl").mkdir()
    for other in ("chats.csv", "cut.parquet"):
        (tmp_path / other).write_text("PAR1 but no more")
    words = {"--data": chats, option: tmp_path / name}
    flat = [word for pair in words.items() for word in pair]
    before = tree(tmp_path)
    error = refused("train", *flat, "--output", tmp_path / "out", *TINY, *SHORT)
    assert name in error
    assert tree(tmp_path) == before


BAD_OPTIONS = {
    "--mask zigzag": r"--mask 'zigzag' is unknown: use one of causal, prefix-lm",
    "--estimator magic": r"--estimator 'magic' is unknown: use one of first-order",
    "--method dpo": r"--method: invalid choice: 'dpo'",
    "--attn flash": r"--attn: invalid choice: 'flash'",
    "--layer-fraction 1.5": r"fraction=1.5",
    "--layer-fraction -0.1": r"fraction=-0.1",
    "--layer-fraction nan": r"fraction=nan",
    "--modules zero_proj": r"\['zero_proj'\]; its linear modules are .*'mlp.up_proj'",
    "--modules ,": r"names=\(\)",
    "--steps 0": r"--steps: must be a whole number >= 1, got 0",
    "--steps -1": r"--steps: must be a whole number >= 1, got -1",
    "--steps 1.5": r"--steps: must be a whole number >= 1, got 1.5",
    "--steps many": r"--steps: must be a whole number >= 1, got many",
    "--batch-size 0": r"--batch-size: must be a whole number >= 1, got 0",
    "--max-length 1": r"--max-length: must be a whole number >= 2, got 1",
    "--max-length 4": r"no answers at all in \d+ chats: \d+ lost theirs to max_length=4",
    "--epochs 0": r"--epochs: must be a positive number, got 0",
    "--epochs nan": r"--epochs: must be a positive number, got nan",
    "--epochs inf": r"--epochs: must be a positive number, got inf",
    "--lr 0": r"--lr: must be a positive number, got 0",
    "--lr fast": r"--lr: must be a positive number, got fast",
    "--inner-lr -1": r"--inner-lr: must be a positive number, got -1",
    "--inner-clip 0": r"--inner-clip: must be a positive number, got 0",
    "--inner-steps -1": r"--inner-steps: must be a whole number >= 0, got -1",
    "--rank 0": r"--rank: must be a whole number >= 1, got 0",
    "--alpha inf": r"--alpha: must be a positive number, got inf",
    "--layers 0": r"--layers: must be a whole number >= 1, got 0",
    "--hidden-size 0": r"--hidden-size: must be a whole number >= 64, got 0",
    "--hidden-size 100": r"--hidden-size must be a multiple of 64, got 100",
    "--vocab-size 10": r"--vocab-size: must be a whole number >= 259, got 10",
    "--seed -1": r"--seed: must be a whole number >= 0, got -1",
    f"--seed {10**30}": r"--seed: must be a whole number",
    "--heldout-fraction 0": r"--heldout-fraction must be between 0 and 1, got 0.0",
    "--heldout-fraction 1": r"--heldout-fraction must be between 0 and 1, got 1.0",
    "--device gpu": r"--device 'gpu' cannot be used",
    "--turns 0": r"--turns: must be a whole number >= 1",
    "--samples 0": r"--samples: must be a whole number >= 1",
    "--typo 3": r"unrecognized arguments: --typo 3",
}


@pytest.mark.parametrize("words", BAD_OPTIONS)
def test_bad_options(tmp_path, chats, words):
    output = tmp_path / "out"
    error = refused("train", "--data", chats, "--output", output, *TINY, *SHORT, *words.split())
    assert re.search(BAD_OPTIONS[words], error), error
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_there(tmp_path, chats):
    words = ("--output", tmp_path / "out", *TINY, *SHORT, "--device", "cuda")
    assert "--device 'cuda' cannot be used" in refused("train", "--data", chats, *words)
    assert "--device 'cuda' cannot be used" in refused("compare", "--quick", "--device", "cuda")


UNUSED = {
    "--samples 3": "--samples has no effect without --data stdlib",
    "--turns 2": "--turns has no effect without --data stdlib",
    "--epochs 3": "--epochs has no effect with --steps",
    "--heldout {chats} --heldout-fraction 0.2": "--heldout-fraction has no effect with --heldout",
    "--method sft": "--layer-fraction has no effect with --method sft",
    "--method sft --estimator unrolled": "--estimator has no effect with --method sft",
    "--model {base}": "--vocab-size has no effect with --model",
    "--data stdlib --heldout {chats}": "--heldout has no effect with --data stdlib",
    "--data stdlib --heldout-fraction 0.2": "--heldout-fraction has no effect with --data stdlib",
}


@pytest.mark.parametrize("words", UNUSED)
def test_options_without_effect_are_noted(tmp_path, chats, base, words):
    extra = words.format(chats=chats, base=base).split()
    # Modules that match nothing: focusft stops after the notes, sft trains its three steps.
    output = tmp_path / "out"
    ran = run("train", "--data", chats, "--output", output, *TINY, *SHORT, "--modules", "x", *extra)
    assert f"note: {UNUSED[words]}" in ran.err


def test_output_that_is_a_file(tmp_path, chats):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file/below"):
        error = refused("train", "--data", chats, "--output", output, *TINY, *SHORT)
        assert f"--output {output}: {tmp_path / 'file'} is a file" in error
    assert tree(tmp_path) == {"file": b"mine"}


def test_output_is_refused_before_anything_slow(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")

    def slow(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr("metafocus.cli.train.model_and_tokenizer", slow)
    assert "is a file" in refused("train", "--data", "stdlib", "--output", tmp_path / "file")
    missing = refused("train", "--data", "no.jsonl", "--output", tmp_path / "out")
    assert "no.jsonl" in missing


# --- models that cannot be used --------------------------------------------------------------


def broken(base: Path, directory: Path, name: str, content: bytes | None) -> Path:
    shutil.copytree(base, directory)
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    return directory


BROKEN = {
    "no template": ("chat_template.jinja", None, "no chat template"),
    "no weights": ("model.safetensors", None, "cannot be loaded: .*model.safetensors"),
    "cut weights": ("model.safetensors", b"cut", "cannot be loaded: .*header"),
    "no config": ("config.json", None, "cannot be loaded"),
    "cut config": ("config.json", b"{", "cannot be loaded: .*JSON"),
    "cut tokenizer": ("tokenizer.json", b"{", "cannot be loaded"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_model_directories(tmp_path, chats, base, name):
    file, content, message = BROKEN[name]
    model = broken(base, tmp_path / "model", file, content)
    before = tree(tmp_path)
    error = refused(
        "train", "--data", chats, "--model", model, "--output", tmp_path / "out", *SHORT
    )
    assert str(model) in error
    assert re.search(message, error), error
    assert tree(tmp_path) == before


def test_missing_model_directory(tmp_path, chats):
    words = ("--model", tmp_path / "nowhere", "--output", tmp_path / "out", *SHORT)
    error = refused("train", "--data", chats, *words)
    assert f"'{tmp_path / 'nowhere'}' cannot be loaded: it is not a directory here" in error
    assert tree(tmp_path) == {}


def test_longer_than_the_model(tmp_path, chats, base):
    words = ("--model", base, "--output", tmp_path / "out", *SHORT, "--max-length", 129)
    error = refused("train", "--data", chats, *words)
    assert error.startswith("--max-length 129 is more than the 128 positions of the model")
    assert refused("compare", "--model", base, "--max-length", 129).startswith("--max-length 129")
    assert tree(tmp_path) == {}


def test_tokenizer_larger_than_the_model(tmp_path, chats, base):
    shutil.copytree(base, tmp_path / "model")
    config = Qwen2Config.from_pretrained(base)
    config.vocab_size -= 1
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    words = ("--model", tmp_path / "model", "--output", tmp_path / "out", *SHORT)
    assert "resize_token_embeddings" in refused("train", "--data", chats, *words)


# --- compare ---------------------------------------------------------------------------------


def test_compare_writes_its_files(tmp_path):
    ran = run("compare", "--quick", "--output", tmp_path / "a/b")
    assert ran.code == 0, ran.err
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {"compare.png", "compare.json"}
    assert (tmp_path / "a/b/compare.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "a/b/compare.json").read_text(), parse_constant=refuse)
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


def test_compare_a_model_on_a_file_in_float64(tmp_path, chats, base):
    words = "--quick --max-length 64 --batch-size 2 --estimators unrolled,unrolled-forward".split()
    more = ("--dtype", "float64", "--data", chats, "--model", base, "--reference", "first-order")
    ran = run("compare", *words, *more, "--output", tmp_path)
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["environment"]["dtype"] == "float64"
    full, forward = (row["relative_error"] for row in found["rows"])
    assert full > 1e-2 and forward == pytest.approx(full, rel=1e-6)
    assert "float64" in ran.out and "batch [2, " in ran.out
    assert "hypergradients against Unrolled(last=0" in ran.out


def test_compare_passes_its_options_on(monkeypatch, chats):
    seen = {}

    def compare(problem, outer, episode, **kwargs):
        seen.update(kwargs, batch=episode.support["input_ids"].shape[0])
        first, second = problem.init(outer), problem.init(outer)
        assert all(torch.equal(first[k], second[k]) for k in first)
        seen["ranks"] = {v.shape[0] for k, v in first.items() if k.endswith("lora_A")}
        return mf.Comparison([], "it")

    monkeypatch.setattr("metafocus.cli.compare.compare", compare)
    words = (
        "--repeats 5 --inner-steps 3 --inner-lr 0.5 --rank 3 --batch-size 4 --reference unrolled"
    )
    ran = run("compare", "--data", chats, *TINY, *words.split(), "--estimators", "first-order")
    assert ran.code == 0, ran.err
    assert seen["repeats"] == 5 and seen["batch"] == 4 and seen["ranks"] == {3}
    assert seen["solver"].lr == 0.5 and seen["solver"].steps == 3
    assert seen["estimators"] == {"first-order": mf.FirstOrder()}
    assert seen["reference"] == mf.Unrolled()


BAD_COMPARE = {
    "--estimators first-order,magic": r"--estimators 'magic' is unknown: use one of first-order",
    "--estimators ,": r"--estimators is empty: use some of first-order",
    "--reference magic": r"--reference 'magic' is unknown",
    "--mask zigzag": r"--mask 'zigzag' is unknown",
    "--repeats 0": r"--repeats: must be a whole number >= 1",
    "--batch-size 0": r"--batch-size: must be a whole number >= 1",
    "--batch-size -2": r"--batch-size: must be a whole number >= 1",
    "--batch-size 11 --data {chats}": r"--batch-size 11 is more than the 10 chats",
    "--max-length 20": r"--data stdlib with --max-length 20: .*cannot hold the evidence",
    "--data missing.jsonl": r"missing.jsonl",
    "--dtype float16": r"--dtype: invalid choice",
    "--layer-fraction 2": r"fraction=2.0",
    "--modules zero_proj": r"zero_proj",
    "--output {chats}": r"chats.jsonl is a file",
    "--inner-lr 1e30 --data {chats}": r"the reference hypergradient \(unrolled\) is not finite",
}


@pytest.mark.parametrize("words", BAD_COMPARE)
def test_bad_compare(tmp_path, chats, base, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused("compare", "--quick", *words.format(chats=chats, base=base).split())
    assert re.search(BAD_COMPARE[words], error), error
    assert tree(tmp_path) == {}


def test_quick_leaves_what_was_asked_for():
    words = "--quick --layers 2 --batch-size 3 --estimators first-order --reference first-order"
    ran = run("compare", *words.split())
    assert ran.code == 0, ran.err
    # 2 layers of 64 are 37,568 fewer than 3 in 181,056.
    assert "with 131,648 parameters" in ran.out and "batch [3, " in ran.out


# --- the program -----------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == mf.__version__


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "train" in out and "compare" in out


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_of_a_command(capsys, command):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    for option in ("--data", "--model", "--mask", "--inner-lr", "--output", "--seed"):
        assert option in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "required: COMMAND"),
        (("tune",), "invalid choice: 'tune'"),
        (("train",), "required: --data, --output"),
    ],
)
def test_incomplete_commands(argv, message):
    error = refused(*argv)
    assert message in error and "--help" in error


def test_as_a_program(tmp_path, chats):
    def program(*argv: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "metafocus", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    words = ("train", "--data", chats, *TINY, *SHORT, "--output", tmp_path / "out")
    good = program(*words)
    assert good.returncode == 0, good.stderr
    assert "held-out answer loss after" in good.stdout and "Warning" not in good.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == SAVED
    bad = program(*words)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("metafocus: error: --output") and bad.stderr.count("\n") == 1


def test_train_with_a_configuration_file(tmp_path):
    """`metafocus train config.yaml` and `--trainer` go to Hugging Face's Trainer."""
    pytest.importorskip("accelerate")
    config = tmp_path / "config.json"
    small = {
        "vocab_size": 400, "hidden_size": 64, "layers": 2, "samples": 8, "max_length": 256,
        "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none",
        "lora_rank": 2, "layer_fraction": 0.5, "disable_tqdm": True, "save_strategy": "no",
        "dataloader_pin_memory": False, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    config.write_text(json.dumps(small))
    assert main(["train", str(config), "--inner_steps", "1"]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_train_with_unknown_trainer_flags(capsys):
    assert main(["train", "--trainer", "--output_dir", "x", "--inner_stepz", "1"]) == 2
    assert "unknown arguments ['--inner_stepz', '1']" in capsys.readouterr().err
