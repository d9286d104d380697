"""`metafocus profile` from words to files, and the Trainer's callback."""

from __future__ import annotations

import contextlib
import json

import commands
import pytest
import torch
from commands import training
from models import NAMES, build, chat_batch

import metafocus as mf
from metafocus.diagnostics import attention_profile, plot_engagement
from metafocus.errors import ProblemError

TINY = "--hidden_size 64 --num_hidden_layers 3 --vocab_size 320 --max_length 320".split()
ADAPT = "--adapt --lora_rank 2 --layer_fraction 0.7 --lora_modules q_proj,k_proj".split()


def run(*words):
    ran = commands.run(*words)
    return ran.code, ran.out, ran.err


def refused(*words):
    return commands.refused("profile", *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model as `metafocus train` leaves it."""
    path = tmp_path_factory.mktemp("profile") / "model"
    code, _, err = run(
        *training("stdlib", path, max_train_samples=8, max_steps=2, method="sft"), *TINY,
    )  # fmt: skip
    assert code == 0, err
    return path


def constant(word):
    raise AssertionError(f"{word} is not JSON")


def test_profiles_a_trained_model(trained, tmp_path):
    out = tmp_path / "new" / "out"
    words = (
        "--model_name_or_path",
        trained,
        "--max_length",
        320,
        "--max_train_samples",
        2,
        "--output_dir",
        out,
    )
    code, text, err = run("profile", *words, "--mask", "causal,context-bidirectional", *ADAPT)
    assert code == 0, err
    names = ["causal", "causal-adapted", "context-bidirectional", "context-bidirectional-adapted"]
    expected = {f"{n}{s}" for n in (*names, "comparison") for s in (".png", ".svg")}
    assert {p.name for p in out.iterdir()} == expected | {"profile.json"}
    report = json.loads((out / "profile.json").read_text(), parse_constant=constant)
    profiles = report["profiles"]
    assert list(profiles) == [name.replace("-adapted", ", adapted") for name in names]
    found = profiles["causal"]["queries"]["answer"]
    assert len(found["sink_mass"]["layers"]) == 3
    assert all(0 < x < 1 for x in found["needle_mass"]["layers"])
    # Fast weights of queries and keys change where the model looks, and the loss falls.
    adapted = profiles["causal, adapted"]["queries"]["answer"]
    assert adapted["entropy"] != found["entropy"]
    for losses in report["inner_losses"].values():
        assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    assert report["settings"]["lora_rank"] == 2 and report["environment"]["torch"]
    for name in profiles:
        assert f"\n{name}, answer queries" in text
    assert f"{found['sink_mass']['layers'][0]:.4f}" in text


def test_one_profile_of_a_file(trained, tmp_path):
    """The numbers are those of the library on the same chats; nothing is compared."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from metafocus.data import Collator, encode_chats

    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What follows {i}?", "evidence": [[13, 14]]},
                {"role": "assistant", "content": f"{i + 1} follows."},
            ]
        }
        for i in range(3)
    ]
    data, out = tmp_path / "chats.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    words = (
        "--model_name_or_path",
        trained,
        "--train_file",
        data,
        "--max_length",
        320,
        "--output_dir",
        out,
    )
    code, _, err = run("profile", *words, "--mask", "context-bidirectional", "--layer", 0)
    assert code == 0, err
    assert {p.suffix for p in out.iterdir()} == {".png", ".svg", ".json"}
    assert not (out / "comparison.png").exists()
    found = json.loads((out / "profile.json").read_text())["profiles"]["context-bidirectional"]
    assert found["rows"] == 3
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    samples = encode_chats(chats, tokenizer, max_length=320).samples
    batch = Collator(pad_token_id=tokenizer.pad_token_id)(samples)
    profile = attention_profile(model, batch, mask=mf.masks.context_bidirectional)
    expected = profile.to_dict()
    for name, value in expected["queries"]["context"].items():
        got = torch.tensor(found["queries"]["context"][name]["heads"])
        assert torch.allclose(got.double(), torch.tensor(value["heads"]).double(), atol=1e-6), name


def test_refusals(trained, tmp_path):
    model = ("--model_name_or_path", trained, "--max_length", 320, "--output_dir", tmp_path / "out")
    assert "mask='sideways' is unknown" in refused(*model, "--mask", "sideways")
    masks = "causal,full,prefix-lm"
    assert "makes 6 profiles with --adapt" in refused(*model, "--mask", masks, "--adapt")
    assert "makes 0 profiles" in refused(*model, "--mask", ",")
    assert "inner_tokens='all' is unknown" in refused(*model, "--inner_tokens", "all", "--adapt")
    assert "use at most --layer 2" in refused(*model, "--layer", 3)
    file = tmp_path / "chats.jsonl"
    file.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    assert "is more than the 1 chats" in refused(
        *model, "--train_file", file, "--max_train_samples", 2
    )
    assert "is a file" in refused("--model_name_or_path", trained, "--output_dir", file)
    assert not (tmp_path / "out").exists()


def test_unused_options_are_noted(trained, tmp_path):
    words = (
        "--model_name_or_path",
        trained,
        "--max_length",
        320,
        "--max_train_samples",
        1,
        "--output_dir",
        tmp_path,
    )
    code, _, err = run("profile", *words, "--lora_rank", 4, "--inner_tokens", "context")
    assert code == 0
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert [note.split()[1] for note in notes] == ["--inner_tokens", "--lora_rank"]


def trainer(model, callbacks, folder, steps=5, resume=None):
    from metafocus.trainer import FocusArguments, FocusTrainer

    batch = chat_batch()
    dataset = [{k: v[0] for k, v in batch.items()}] * 8
    arguments = FocusArguments(
        str(folder), max_steps=steps, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="steps", save_steps=4, logging_strategy="no", learning_rate=1e-2,
        lr_scheduler_type="constant", inner_lr=0.1,
        per_device_train_batch_size=2,
    )  # fmt: skip
    with contextlib.redirect_stdout(None):
        trainer = FocusTrainer(model, arguments, train_dataset=dataset, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)


def test_callback(tmp_path):
    """Before, during and after; the training is the same to the last bit."""
    from metafocus.trainer.profiling import ProfileCallback

    batch = chat_batch(seed=3)
    model, alone = build(dtype=torch.float32), build(dtype=torch.float32)
    before = attention_profile(model, batch, mask=mf.masks.context_bidirectional)
    callback = ProfileCallback(batch, every=2)
    trainer(model, [callback], tmp_path)
    trainer(alone, [], tmp_path)
    assert [moment.step for moment in callback.history] == [0, 2, 4, 5]
    assert torch.equal(callback.first.sink_mass, before.sink_mass)
    after = attention_profile(model, batch, mask=mf.masks.context_bidirectional)
    assert torch.equal(callback.last.sink_mass, after.sink_mass)
    assert callback.history[0].entropy != callback.history[-1].entropy
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)
    plot_engagement(callback.history, tmp_path / "engagement.png")
    assert (tmp_path / "engagement.png").stat().st_size > 5000


def test_callback_with_adaptation(tmp_path):
    """Fast weights are made for each profile; a batch may come from another collator."""
    from metafocus.trainer.profiling import ProfileCallback

    adapter = mf.LoRA(mf.top_layers(0.5, NAMES), rank=2, alpha=4.0)

    def adapt(model, batch):
        meta = mf.recipes.focusft(model, adapter=adapter)
        return adapter, meta({}, mf.Episode(batch, batch))[1].params

    batch = chat_batch(seed=3)
    labels = torch.where(batch["answer_mask"], batch["input_ids"], -100)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")} | {"labels": labels}
    model = build(dtype=torch.float32)
    plain, adapted = (ProfileCallback(inputs, every=4, adapt=a) for a in (None, adapt))
    trainer(model, [plain, adapted], tmp_path, steps=4)
    assert [m.step for m in adapted.history] == [0, 4]
    assert plain.history[0].entropy != adapted.history[0].entropy
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_history_survives_a_resume(tmp_path):
    """Stopped after 4 of 6 steps and resumed, the history is that of a run in one piece."""
    from metafocus.trainer.profiling import ProfileCallback

    def run(folder, steps, resume=None):
        callback = ProfileCallback(chat_batch(seed=3), every=2)
        trainer(build(dtype=torch.float32), [callback], folder, steps, resume)
        return callback.history

    whole = run(tmp_path / "whole", 6)
    assert [m.step for m in whole] == [0, 2, 4, 6]
    run(tmp_path / "parts", 4)
    resumed = run(tmp_path / "parts", 6, str(tmp_path / "parts" / "checkpoint-4"))
    assert resumed == whole
    # Without the file a new history begins where the run does.
    (tmp_path / "parts" / "checkpoint-4" / "attention_profile.json").unlink()
    assert [m.step for m in run(tmp_path / "parts", 6, str(tmp_path / "parts/checkpoint-4"))] == [
        4,
        6,
    ]


def test_callback_refuses(tmp_path):
    from metafocus.trainer.profiling import ProfileCallback

    for every in (0, 1.5, True):
        with pytest.raises(ProblemError, match=f"every must be an integer >= 1, got {every!r}"):
            ProfileCallback(chat_batch(), every=every)


def test_the_length_follows_the_model(trained, tmp_path):
    """Without --max_length, chats fit the model's positions; with it, it must fit them."""
    code, _, err = run(
        "profile",
        "--model_name_or_path",
        trained,
        "--max_train_samples",
        2,
        "--output_dir",
        tmp_path / "a",
    )
    assert code == 0, err
    assert (
        json.loads((tmp_path / "a" / "profile.json").read_text())["settings"]["max_length"] == 320
    )
    words = ("--model_name_or_path", trained, "--max_length", 512, "--output_dir", tmp_path / "b")
    assert "max_length=512 is more than the 320 positions" in refused(*words)
