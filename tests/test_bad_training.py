"""What a run meets that it cannot use: one clear sentence each, and nothing saved is lost."""

from __future__ import annotations

import json
import re

import pytest
import torch
from commands import chat, settings, write, written
from trainer_script import (
    ADAPTER,
    COLLATOR,
    SAMPLES,
    arguments,
    mean_answer_loss,
    sample,
    tiny,
    trainer,
    weights,
)
from transformers import Qwen2ForCausalLM

import metafocus as mf
from metafocus.__main__ import main
from metafocus.cli.settings import parse
from metafocus.errors import DataError, NonFiniteError, ProblemError
from metafocus.masks import context_bidirectional
from metafocus.sharding import Sharding, sharding_of
from metafocus.trainer.checkpoints import damage, resumable
from metafocus.trainer.inner import start_seed

SAVING = {"save_strategy": "steps", "save_steps": 1}


def logged(run, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


def says(text: str, error: type[Exception] = DataError):
    """An error of exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


# --- an inner loss that is not a number --------------------------------------------------------

EXPLODING = {"inner_lr": 1e200}
"""The second inner loss overflows, by no fault of the guard's: real fast weights of 1e200."""


@pytest.mark.parametrize("estimator", ["first-order", "unrolled-recompute"])
def test_an_inner_loop_that_explodes_is_a_step_of_plain_training(tmp_path, estimator):
    run = trainer(tiny(), tmp_path, estimator=estimator, **EXPLODING)
    run.train()
    plain = trainer(tiny(), tmp_path, method="sft", mask="context-bidirectional")
    plain.train()
    expected = weights(plain.model)
    assert (weights(run.model) - expected).norm() < 1e-12 * expected.norm()
    assert logged(run, "skipped_adaptations") == [1.0, 2.0, 3.0, 4.0]


def test_too_many_explosions_stop_the_run_and_leave_its_checkpoints(tmp_path):
    run = trainer(tiny(torch.float32), tmp_path, max_skipped=2, **SAVING, inner_lr=1e30)
    with says(
        "3 adaptations were not finite and were left out by step 3, more than max_skipped=2. Lower "
        "inner_lr or inner_clip, or look at the data; the checkpoints saved so far are whole.",
        NonFiniteError,
    ):
        run.train()
    assert resumable(tmp_path) == tmp_path / "checkpoint-2"
    calm = trainer(tiny(torch.float32), tmp_path, allow_changed=True, **SAVING)
    calm.train(resume_from_checkpoint=True)
    assert calm.state.global_step == 4
    assert logged(calm, "skipped_adaptations") == [1.0, 2.0, 0.0, 0.0]


class Cliff:
    """Gives NaN to fast weights whose gradient is over a limit: one example of a batch."""

    steps = 1

    def __init__(self, limit: float):
        self.limit = limit

    def init(self, params):
        return ()

    def update(self, params, grads, state, step, outer):
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        rate = torch.where(norm > self.limit, torch.nan, 1.0)
        return {k: v - rate * grads[k] for k, v in params.items()}, state


def seen_by(one, length: int) -> torch.Tensor:
    """Which keys a token sees: the context all of itself, answers what comes before."""
    context = one["turn_ids"] == 0
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal | (context[:, None] & context[None, :])


def test_per_example_only_the_example_that_fails_is_left_out(tmp_path):
    data, seed = [SAMPLES[0], SAMPLES[2]], start_seed(0, 0, 0)

    def by_itself(one) -> tuple[float, float, int]:
        """Its gradient norm, its adapted loss, its answer tokens."""
        model, batch = tiny(), COLLATOR([one])
        loss = mf.lm_loss(model, adapter=ADAPTER, mask=context_bidirectional)
        start = ADAPTER.init(model, torch.Generator().manual_seed(seed))
        problem = mf.Problem(loss, loss, lambda _, support: start)
        fast = mf.adapt(problem, {}, batch, solver=mf.SGD(1.0, 1)).params
        moved = torch.stack([(fast[k] - start[k]).square().sum() for k in fast]).sum().sqrt()
        return moved.item(), loss(fast, {}, batch).item(), int(one["answer_mask"].sum())

    facts = [by_itself(one) for one in data]
    calm, wild = sorted(range(2), key=lambda i: facts[i][0])
    cliff = Cliff((facts[0][0] + facts[1][0]) / 2)
    run = trainer(
        tiny(), tmp_path, samples=data, max_steps=1, per_example=True,
        train_sampling_strategy="sequential", kept={"recipe": {"solver": cliff}},
    )  # fmt: skip
    run.train()
    assert logged(run, "skipped_adaptations") == [1.0]
    unadapted = mean_answer_loss(tiny(), [data[wild]], lambda n: seen_by(data[wild], n))
    counts = [fact[2] for fact in facts]
    total = facts[calm][1] * counts[calm] + unadapted * counts[wild]
    assert logged(run, "loss") == pytest.approx([total / sum(counts)], rel=1e-6)


# --- batches and samples -----------------------------------------------------------------------


def test_a_batch_without_answers_among_others(tmp_path):
    """Nothing adapts to it, nothing is learned from it, and the steps around it are whole."""
    data = [SAMPLES[0], SAMPLES[1], SAMPLES[6], sample(5, [], 9)]
    run = trainer(
        tiny(), tmp_path, samples=data, max_steps=2, train_sampling_strategy="sequential", **SAVING,
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    run.train()
    assert logged(run, "loss")[0] > 0 and logged(run, "loss")[1] == 0.0
    assert logged(run, "skipped_adaptations") == [0.0, 0.0]
    after = [
        Qwen2ForCausalLM.from_pretrained(tmp_path / f"checkpoint-{i}", dtype=torch.float64)
        for i in (1, 2)
    ]
    assert torch.equal(*map(weights, after))
    held = [sample(8, [], 1)]
    assert trainer(tiny(), tmp_path, heldout=held).evaluate()["eval_loss"] == 0.0


def test_no_sample_at_all(tmp_path):
    text = (
        "{} is empty: pass at least one sample, or leave it out. encode_chats leaves out chats "
        "without an answer and counts them."
    )
    with says(text.format("train_dataset")):
        trainer(tiny(), tmp_path, samples=[])
    with says(text.format("eval_dataset")):
        trainer(tiny(), tmp_path, heldout=[])
    with says(text.format("eval_dataset['b']")):
        trainer(tiny(), tmp_path, heldout={"a": SAMPLES, "b": []})


def test_a_sample_longer_than_the_models_positions(tmp_path):
    with says(
        "train_dataset[1] has 70 tokens, the model has 64 positions: encode with max_length=64, or "
        "raise the model's max_position_embeddings (and its rope scaling)."
    ):
        trainer(tiny(), tmp_path, samples=[SAMPLES[0], sample(70, [60], 0)])

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from [*SAMPLES[:2], *SAMPLES[:2], sample(70, [60], 0)]

    run = trainer(tiny(torch.float32), tmp_path, samples=Stream(), **SAVING)
    with says(
        "a batch has 70 tokens in a row, the model has 64 positions: encode with max_length=64, or "
        "raise the model's max_position_embeddings (and its rope scaling)."
    ):
        run.train()
    assert resumable(tmp_path) == tmp_path / "checkpoint-2"


# --- types -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "rest", "changes", "text"),
    [
        (torch.bfloat16, torch.float32, {}, "torch.bfloat16, torch.float32"),
        (torch.float64, torch.float32, {"bf16": True}, "torch.float32, torch.float64"),
    ],
    ids=["bfloat16", "float64"],
)
def test_parameters_of_several_types(tmp_path, first, rest, changes, text):
    model = tiny(rest)
    model.model.layers[0].to(first)
    with says(
        f"the trained parameters are of {text}: optimiser and gradient scaler need one type, "
        "float32. Call model.float() and set bf16=True or fp16=True for mixed precision.",
        ProblemError,
    ):
        trainer(model, tmp_path, **changes)


def test_half_precision_that_would_do_nothing(tmp_path):
    with says(
        "fp16=True has no effect on a CPU, where accelerate neither casts nor scales: set "
        "bf16=True, or train in float32.",
        ProblemError,
    ):
        trainer(tiny(torch.float32), tmp_path, fp16=True)


def test_a_best_metric_that_nobody_measures(tmp_path):
    """transformers raises at the first evaluation, which may be hours later."""
    best = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_accuracy"}
    held = {"heldout": SAMPLES[:2], **best}
    with says(
        "metric_for_best_model='eval_accuracy' is not measured: without compute_metrics there is "
        "only 'loss'."
    ):
        trainer(tiny(), tmp_path, **held)
    measured = trainer(tiny(), tmp_path, kept={"compute_metrics": lambda found: {}}, **held)
    assert measured.args.metric_for_best_model == "eval_accuracy"
    assert trainer(tiny(), tmp_path, **{**held, "metric_for_best_model": "loss"})


@pytest.mark.parametrize(
    ("kind", "given", "text"),
    [
        ("linear", {"a": 1}, "'a' is not one of its settings (none)"),
        ("cosine", {"cycles": 2}, "'cycles' is not one of its settings (num_cycles)"),
        # transformers itself ignores all settings of this one.
        ("constant_with_warmup", {"min_lr": 0.1}, "'min_lr' is not one of its settings (none)"),
        (
            "warmup_stable_decay",
            {},
            "'num_decay_steps' is missing from its settings (num_decay_steps, num_stable_steps, "
            "warmup_type, decay_type, min_lr_ratio, num_cycles)",
        ),
    ],
)
def test_settings_of_another_scheduler(tmp_path, kind, given, text):
    with says(
        f"lr_scheduler_kwargs={given} does not fit lr_scheduler_type='{kind}': {text}.", DataError
    ):
        trainer(tiny(), tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=given)


def test_settings_of_the_scheduler_arrive(tmp_path):
    run = trainer(
        tiny(), tmp_path, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 2.0}
    )
    run.train()
    whole = 1e-2 * (1 - 1 / run.state.max_steps) ** 2
    assert logged(run, "learning_rate")[1] == pytest.approx(whole, rel=1e-4)  # lr_end is 1e-7


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"save_strategy": "steps", "save_steps": 0}, "save_steps must be > 0, got 0"),
        ({"save_strategy": "steps", "save_steps": -1}, "save_steps must be > 0, got -1"),
        ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps must be > 0, got 0"),
        ({"logging_steps": -2}, "logging_steps must be > 0, got -2"),
        ({"save_total_limit": 0}, "save_total_limit must be >= 1, got 0"),
        ({"max_steps": -5}, "max_steps must be >= 1, or -1 for num_train_epochs, got -5"),
    ],
    ids=str,
)
def test_numbers_below_one_that_would_mean_never(changes, text):
    with pytest.raises(ProblemError, match=f"^{re.escape(text)}"):
        arguments("run", **changes)


def test_no_checkpoints_and_no_log_are_possible():
    assert arguments("run", save_strategy="no", save_steps=0, logging_strategy="no")


def test_settings_that_are_no_json():
    start = re.escape("lr_scheduler_kwargs='{power: 2}' is not JSON: Expecting")
    with pytest.raises(ProblemError, match=f"^{start}"):
        arguments("run", lr_scheduler_kwargs="{power: 2}")


def test_frozen_parameters_may_be_narrow(tmp_path):
    """What is not trained may have another type, as in training an outer LoRA."""
    model = tiny(torch.float32)
    model.model.layers[0].mlp.to(torch.bfloat16).requires_grad_(False)
    assert trainer(model, tmp_path, bf16=True).args.bf16


# --- directories and checkpoints ---------------------------------------------------------------


def test_an_output_directory_that_cannot_be_written_to(tmp_path):
    """Below a file: permissions would not stop a test that runs as root."""
    (tmp_path / "file").write_text("kept")
    place = tmp_path / "file" / "run"
    with says(
        f"output_dir='{place}' cannot be written to: Not a directory. Name another directory."
    ):
        trainer(tiny(), place)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_directory_that_stops_being_writable_leaves_the_checkpoints_before(tmp_path):
    (tmp_path / "checkpoint-3").write_text("a file where the third checkpoint should go")
    run = trainer(tiny(torch.float32), tmp_path, **SAVING)
    with pytest.raises(DataError, match=r"checkpoint-3: Not a directory\. What lies there is"):
        run.train()
    assert resumable(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-3").unlink()
    again = trainer(tiny(torch.float32), tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_a_checkpoint_whose_bytes_were_overwritten(tmp_path):
    """Of the right size, so that only reading it shows; the one before it is not touched."""
    run = trainer(tiny(torch.float32), tmp_path, max_steps=2, **SAVING)
    run.train()
    model = tmp_path / "checkpoint-2" / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[:8] = b"\xff" * 8
    model.write_bytes(content)
    assert damage(tmp_path / "checkpoint-2") == "model.safetensors is missing or cut off"
    before = (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes()
    run = trainer(tiny(torch.float32), tmp_path, max_steps=2)
    with pytest.warns(UserWarning) as found:
        run.train(resume_from_checkpoint=True)
    assert (
        f"{tmp_path / 'checkpoint-2'} is passed over: model.safetensors is missing or cut off; "
        "resuming from checkpoint-1."
    ) in [str(warning.message) for warning in found]
    assert (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes() == before
    assert model.read_bytes() == bytes(content)


def test_the_only_checkpoint_is_damaged(tmp_path):
    run = trainer(tiny(torch.float32), tmp_path, max_steps=1, **SAVING)
    run.train()
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_bytes(b"")
    with says(
        f"no checkpoint in {tmp_path} can be resumed; the newest that was saved to its end, "
        "checkpoint-1, is damaged: optimizer.pt is cut off. Restore it, name another with "
        "resume_from_checkpoint=PATH, or delete it to start over."
    ):
        trainer(tiny(torch.float32), tmp_path).train(resume_from_checkpoint=True)


# --- the command -------------------------------------------------------------------------------

NO_ANSWER = json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n"


def refused(folder, capsys, **changes) -> str:
    """What `metafocus train` prints before it ends with 2; nothing is written."""
    config = written(folder, settings(folder, **changes))
    assert main(["train", config]) == 2
    assert not list((folder / "run").glob("*"))
    return capsys.readouterr().err.removeprefix("metafocus: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"inner_stepz": 2, "learning_rat": 1},
            "{folder}/config.yaml: unknown setting inner_stepz, did you mean inner_steps?; unknown "
            "setting learning_rat, did you mean learning_rate? (see metafocus train --help)",
        ),
        (
            {"learning_rate": "fast"},
            "argument --learning_rate: invalid float value: 'fast' (see metafocus train --help)",
        ),
        (
            {"evaluate_on": "labels"},
            "evaluate_on='labels' is unknown: use one of deployed, prompt.",
        ),
        (
            {"output_dir": "{folder}/train.jsonl/run"},
            "--output_dir {folder}/train.jsonl/run: {folder}/train.jsonl is a file. Name a "
            "directory.",
        ),
        (
            {"resume_from_checkpoint": "{folder}/none"},
            "resume_from_checkpoint='{folder}/none' cannot be resumed: it is not a directory. Pass "
            "True to use the newest complete checkpoint of the output directory.",
        ),
        (
            {"train_file": "{folder}/none.jsonl"},
            "path='{folder}/none.jsonl' is not a file: check the name and the folder",
        ),
        (
            {"max_length": 8},
            "no answers at all in 8 chats: 8 lost theirs to max_length=8 on the right side: raise "
            "max_length or set tokenizer.truncation_side='left'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_used(tmp_path, capsys, changes, text):
    changes = {
        key: value.format(folder=tmp_path) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    assert refused(tmp_path, capsys, **changes) == text.format(folder=tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "path='{file}' holds no record: write one chat per line or row"),
        ("\n\n", "path='{file}' holds no record: write one chat per line or row"),
        (
            NO_ANSWER * 2,
            "no answers at all in 2 chats: 2 have no trained assistant message: check the roles "
            "and weights of the messages",
        ),
        (
            NO_ANSWER + NO_ANSWER[:-9],
            "{file}, line 2: not JSON (Expecting value: line 1 column 42 "
            "(char 41)): write one complete JSON object per line, in UTF-8",
        ),
    ],
    ids=["empty", "blank", "no-answers", "cut-off"],
)
@pytest.mark.parametrize("which", ["train_file", "validation_file"])
def test_data_that_cannot_be_used(tmp_path, capsys, which, content, text):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    assert refused(tmp_path, capsys, **{which: str(file)}) == text.format(file=file)
    assert file.read_text() == content


def test_a_long_chat_is_cut_and_counted(tmp_path, capsys):
    """Through the command nothing can be too long: what does not fit is cut and counted."""
    long = chat(2)
    long["messages"] += [{"role": "user", "content": "why " * 60}, long["messages"][-1]]
    path = write(tmp_path / "long.jsonl", chat(0), chat(1), long)
    config = written(tmp_path, settings(tmp_path, train_file=str(path), max_steps=1))
    assert main(["train", config]) == 0
    assert "1 truncated, 0 dropped without an answer." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "ACCELERATE_USE_DEEPSPEED=true"),
        ("PARALLELISM_CONFIG_CP_SIZE", "2", r"context parallelism \(cp_size=2\)"),
    ],
)
def test_parallelism_of_the_environment_is_refused_by_name(
    tmp_path, monkeypatch, name, value, said
):
    """`accelerate launch` gives its settings through variables, which name no argument."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ProblemError, match=said):
        arguments(tmp_path)


def test_a_tensor_parallel_model_is_refused_by_name():
    model = tiny()
    model._tp_size = 2
    assert Sharding.TP in sharding_of(model)
    with pytest.raises(ProblemError, match="Qwen2ForCausalLM is tensor parallel"):
        mf.recipes.focusft(model)


@pytest.mark.parametrize(("word", "means"), [("true", True), ("false", None)])
def test_fsdp_is_a_truth_value_in_a_file(tmp_path, word, means):
    """transformers takes the flag alone, or options that it no longer likes."""
    config = tmp_path / "run.yaml"
    config.write_text(f"train_file: stdlib\noutput_dir: out\nuse_cpu: true\nfsdp: {word}\n")
    assert parse([str(config)]).args.fsdp is means
