"""FocusTrainer against loops written by hand, and what a user of the Trainer expects of it."""

from __future__ import annotations

import copy
import dataclasses
import signal
import warnings

import pytest
import torch
from torch import Tensor
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
from transformers import Qwen2ForCausalLM, Trainer, TrainerCallback

import metafocus as mf
from metafocus.adapters import LoRA, slots
from metafocus.data import Collator, pack
from metafocus.errors import DataError, NonFiniteError, ProblemError
from metafocus.masks import causal, context_bidirectional
from metafocus.trainer import FocusArguments, FocusOptions, FocusTrainer
from metafocus.trainer.batch import Labelled, as_batch, labels_of, prompts
from metafocus.trainer.inner import Guarded, Stopwatch, start_seed
from metafocus.trainer.peft import BelowPeft

SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
SFT = {"method": "sft", "mask": "context-bidirectional"}
ORDER = {"train_sampling_strategy": "sequential"}


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def trained(folder, model=None, **changes):
    run = trainer(tiny() if model is None else model, folder, **changes)
    run.train()
    return run


def logged(run, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


# --- the loss --------------------------------------------------------------------------------


def tokens(batch) -> int:
    return int(batch["answer_mask"][:, 1:].sum())


@pytest.mark.parametrize("method", ["sft", "focusft"])
def test_steps_equal_a_loop_by_hand(tmp_path, method):
    """Two micro-batches of two: the loss is the mean over the answer tokens of all four."""
    run = trained(
        tmp_path, **SGD, **ORDER, max_steps=2, gradient_accumulation_steps=2,
        lr_scheduler_type="constant", **(SFT if method == "sft" else {}),
    )  # fmt: skip
    model = tiny()
    generator = torch.Generator()
    meta = mf.recipes.focusft(model, adapter=ADAPTER, generator=generator)
    if method == "sft":
        meta = mf.recipes.focusft(model, adapter=mf.NoAdapter(), mask=context_bidirectional)
    losses = []
    for step in range(2):
        batches = [COLLATOR(SAMPLES[i : i + 2]) for i in (4 * step, 4 * step + 2)]
        total = sum(tokens(batch) for batch in batches)
        model.zero_grad()
        value = 0.0
        for micro, batch in enumerate(batches):
            generator.manual_seed(start_seed(0, step, micro))
            loss = meta({}, mf.Episode(batch, batch))[0] * tokens(batch) / total
            loss.backward()
            value += loss.item()
        losses.append(value)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    assert relative(weights(run.model), weights(model)) < 1e-13
    assert logged(run, "loss") == pytest.approx(losses, rel=1e-6)


def test_one_times_four_is_four_times_one_for_sft(tmp_path):
    runs = [
        trained(
            tmp_path, **SFT, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size
        )
        for size in (1, 2, 4)
    ]
    for run in runs[1:]:
        assert relative(weights(run.model), weights(runs[0].model)) < 1e-12


def test_one_times_four_differs_for_shared_fast_weights(tmp_path):
    """By construction: each micro-batch adapts to its own samples."""
    one, four = (
        trained(
            tmp_path,
            adaptation_start="step",
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
        for size in (1, 4)
    )
    assert relative(weights(one.model), weights(four.model)) > 1e-8


def test_one_times_four_is_four_times_one_per_example(tmp_path):
    runs = [
        trained(
            tmp_path,
            adaptation_start="step",
            per_example=True,
            max_steps=2,
            **SGD,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
        for size in (1, 4)
    ]
    assert relative(weights(runs[1].model), weights(runs[0].model)) < 1e-12


def test_starts_are_new_in_every_micro_batch_or_step(tmp_path):
    for start, count in (("micro-batch", 4), ("step", 2)):
        seen = []

        def factory(model, generator, seen=seen):
            inner = mf.recipes.focusft(model, adapter=ADAPTER, generator=generator)

            def meta_loss(outer, episode):
                seen.append(generator.initial_seed())
                return inner(outer, episode)

            return meta_loss

        trained(tmp_path, max_steps=2, gradient_accumulation_steps=2, adaptation_start=start,
                kept={"meta_loss_factory": factory})  # fmt: skip
        assert len(seen) == 4 and len(set(seen)) == count


def test_objects_replace_words(tmp_path):
    by_object = trained(tmp_path, kept={"recipe": {"estimator": mf.Unrolled(recompute=True)}})
    by_word = trained(tmp_path, estimator="unrolled-recompute")
    first_order = trained(tmp_path)
    assert torch.equal(weights(by_object.model), weights(by_word.model))
    assert relative(weights(first_order.model), weights(by_word.model)) > 1e-8


def test_a_packed_row_is_the_samples_it_holds(tmp_path):
    rows = pack(SAMPLES[:4], 64)
    assert len(rows) == 1
    packed = trained(tmp_path, samples=rows, **SFT, **SGD, max_steps=1)
    apart = trained(tmp_path, samples=SAMPLES[:4], **SFT, **SGD, max_steps=1,
                    per_device_train_batch_size=4)  # fmt: skip
    assert relative(weights(packed.model), weights(apart.model)) < 1e-12


def test_batches_of_equal_length(tmp_path):
    run = trained(tmp_path, train_sampling_strategy="group_by_length", max_steps=2)
    assert len(logged(run, "loss")) == 2


def test_hugging_face_collators_will_do(tmp_path):
    """A batch of input_ids and labels alone trains as the one with masks and turns does."""

    def plainly(samples):
        batch = COLLATOR(samples)
        return {
            **{k: batch[k] for k in ("input_ids", "attention_mask")},
            "labels": labels_of(batch),
        }

    settings = {"samples": SAMPLES[:6], "max_steps": 2}
    ours = trained(tmp_path, **settings)
    theirs = FocusTrainer(
        tiny(), arguments(tmp_path, max_steps=2), train_dataset=SAMPLES[:6], data_collator=plainly
    )
    theirs.train()
    assert relative(weights(theirs.model), weights(ours.model)) < 1e-12


def test_documents_begin_where_positions_do():
    inputs = {
        "input_ids": torch.ones(1, 5, dtype=torch.int64),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
        "labels": torch.tensor([[-100, -100, 4, -100, 5]]),
    }
    batch = as_batch(inputs)
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert batch["turn_ids"].tolist() == [[0, 0, 1, 2, 3]]
    assert Labelled(lambda x: x)({**batch})["labels"].tolist() == [[-100, -100, 1, -100, 1]]
    with pytest.raises(DataError, match="remove_unused_columns"):
        as_batch({"input_ids": inputs["input_ids"]})


# --- precision, memory, compilation ----------------------------------------------------------


def test_both_loops_compute_in_the_same_precision(tmp_path):
    model, seen, fast = tiny(torch.float32), set(), set()

    def look(module, args, output):
        if slots.bound(module):
            seen.add((torch.is_autocast_enabled("cpu"), args[0].dtype))

    @dataclasses.dataclass(frozen=True)
    class Watching(mf.SGD):
        def update(self, params, grads, state, step, outer):
            fast.update(v.dtype for v in (*params.values(), *grads.values()))
            return super().update(params, grads, state, step, outer)

    model.model.layers[1].mlp.down_proj.register_forward_hook(look)
    # A small rate, because at a large one rounding grows from step to step.
    slow = {"learning_rate": 1e-5}
    run = trained(tmp_path, model, bf16=True, kept={"recipe": {"solver": Watching(1.0, 2)}}, **slow)
    assert seen == {(True, torch.bfloat16)}
    assert fast == {torch.float32}
    wide = trained(tmp_path, tiny(torch.float32), **slow)
    # bfloat16 has 8 bits: one rounding is 2^-9 of a value.
    assert logged(run, "loss") == pytest.approx(logged(wide, "loss"), rel=2**-9)
    assert logged(run, "loss") != logged(wide, "loss")


@pytest.mark.parametrize("estimator", ["first-order", "unrolled-recompute"])
def test_checkpointing_changes_nothing(tmp_path, estimator):
    with warnings.catch_warnings():
        # transformers is about to call it activation_checkpointing.
        warnings.simplefilter("ignore", FutureWarning)
        saving = trained(tmp_path, estimator=estimator, gradient_checkpointing=True)
    # transformers' RMSNorm rounds to float32, and AdamW divides by small numbers.
    limit = 1e-13 if estimator == "first-order" else 1e-7
    plain = trained(tmp_path, estimator=estimator)
    assert relative(weights(saving.model), weights(plain.model)) < limit


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_layers_change_nothing(tmp_path):
    compiled = trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert relative(weights(compiled.model), weights(trained(tmp_path).model)) < 1e-12
    layers = compiled.model.model.layers
    assert [layer._compiled_call_impl is not None for layer in layers] == [True, False]


def test_compiling_and_second_order_is_refused(tmp_path):
    run = trainer(tiny(), tmp_path, torch_compile=True, torch_compile_backend="eager",
                  estimator="unrolled")  # fmt: skip
    with pytest.raises(ProblemError, match="differentiated twice"):
        run.train()


# --- PEFT ------------------------------------------------------------------------------------


def peft_model():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=3, target_modules=["q_proj", "gate_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        # peft asks transformers by a name that is about to go.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(tiny(), config)


def test_outer_lora_is_trained_with_fast_weights_below_it(tmp_path):
    model = peft_model()
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        run = trained(tmp_path, model, **SGD, **ORDER, max_steps=1, lr_scheduler_type="constant",
                      save_strategy="steps", save_steps=1)  # fmt: skip
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if "lora_" in k}
    placed = run._settings()["adapter"].modules(model)
    assert [path.split("layers.1.")[1] for path in placed] == [
        "mlp.gate_proj.base_layer",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").exists()

    # The same step on the plain model: outer LoRA added to its weights is what it computes.
    plain, merged = peft_model(), {}
    slow = {k: v for k, v in plain.named_parameters() if v.requires_grad}
    for name, module in plain.named_modules():
        if hasattr(module, "base_layer"):
            path = name.removeprefix("base_model.model.")
            delta = module.scaling["default"] * (
                module.lora_B["default"].weight @ module.lora_A["default"].weight
            )
            merged[f"{path}.weight"] = module.base_layer.weight.detach() + delta
    model, batch = tiny().requires_grad_(False), COLLATOR(SAMPLES[:2])
    fast = ADAPTER.init(model, torch.Generator().manual_seed(start_seed(0, 0, 0)))
    loss = mf.lm_loss(model, adapter=ADAPTER, mask=context_bidirectional)
    problem = mf.Problem(loss, loss, lambda _, support: fast)
    solver = mf.SGD(1.0, 2, clip=mf.clip_per_tensor(1.0))
    meta = mf.bilevel(problem, solver=solver, estimator=mf.FirstOrder())
    meta(merged, mf.Episode(batch, batch))[0].backward()
    for name, value in run.model.named_parameters():
        if value.requires_grad:
            expected = before[name] - 0.1 * slow[name].grad
            assert relative(value.detach(), expected) < 1e-12, name


def test_below_peft_leaves_peft_matrices_alone():
    model = peft_model()
    placed = BelowPeft(mf.all_linear)(model)
    assert not [path for path in placed if "lora_" in path]
    assert len([path for path in placed if path.endswith("base_layer")]) == 4
    assert len(placed) == 14


# --- logging ---------------------------------------------------------------------------------


def test_the_inner_loop_is_logged_as_means_over_the_window(tmp_path):
    fine = trained(tmp_path, gradient_accumulation_steps=2, logging_steps=1, max_steps=4,
                   learning_rate=1e-30, samples=SAMPLES[:6])  # fmt: skip
    coarse = trained(tmp_path, gradient_accumulation_steps=2, logging_steps=4, max_steps=4,
                     learning_rate=1e-30, samples=SAMPLES[:6])  # fmt: skip
    names = [
        "inner_loss_0", "inner_loss_1", "inner_loss_first", "inner_loss_last", "adaptation_gain",
        "fast_weight_norm", "fast_weight_shift", "skipped_adaptations",
    ]  # fmt: skip
    for name in names:
        assert len(logged(fine, name)) == 4 and len(logged(coarse, name)) == 1
    assert 0 < logged(coarse, "inner_time_share")[0] < 1
    assert logged(coarse, "inner_loss_0") == logged(coarse, "inner_loss_first")
    assert logged(coarse, "inner_loss_1") == logged(coarse, "inner_loss_last")
    # The gain is the loss before the inner loop minus the loss after it.
    assert logged(coarse, "adaptation_gain")[0] > 0


def test_logged_values_are_those_of_the_meta_loss(tmp_path):
    run = trained(tmp_path, **ORDER, max_steps=1)
    model, batch = tiny(), COLLATOR(SAMPLES[:2])
    generator = torch.Generator().manual_seed(start_seed(0, 0, 0))
    loss, aux = mf.recipes.focusft(model, adapter=ADAPTER, generator=generator)(
        {}, mf.Episode(batch, batch)
    )
    start = ADAPTER.init(model, torch.Generator().manual_seed(start_seed(0, 0, 0)))
    shift = sum((aux.params[k] - start[k]).square().sum() for k in start).sqrt()
    norm = sum(v.square().sum() for v in aux.params.values()).sqrt()
    expected = {
        "inner_loss_first": aux.inner_losses[0],
        "inner_loss_last": aux.inner_losses[1],
        "adaptation_gain": aux.inner_losses[0] - loss.detach(),
        "fast_weight_shift": shift,
        "fast_weight_norm": norm,
    }
    for name, value in expected.items():
        assert logged(run, name) == pytest.approx([value.item()], rel=1e-5, abs=1e-7), name


class Listener(TrainerCallback):
    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append(dict(logs))


def test_callbacks_hear_it(tmp_path):
    listener = Listener()
    trained(tmp_path, callbacks=[listener], max_steps=1)
    assert {"adaptation_gain", "fast_weight_norm", "inner_time_share"} <= listener.heard[0].keys()
    assert all(isinstance(v, float) for v in listener.heard[0].values())


def test_plain_sft_logs_no_inner_loop(tmp_path):
    run = trained(tmp_path, **SFT, max_steps=1)
    assert not [key for entry in run.state.log_history for key in entry if "inner" in key]


def test_tensorboard_receives_it(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trained(tmp_path, report_to="tensorboard", max_steps=2)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert len(events.Scalars("train/adaptation_gain")) == 2


# --- evaluation ------------------------------------------------------------------------------


# The last sample begins with an answer token, as one that was cut on its left side does.
ALL = [*SAMPLES, sample(8, [0, 1, 5], 7)]


def test_evaluation_is_the_deployed_model(tmp_path):
    """The mean over answer tokens, whatever the batches, the padding and the packing."""
    expected = mean_answer_loss(tiny(), ALL)
    for size in (1, 3, 8):
        run = trainer(tiny(), tmp_path, heldout=ALL, per_device_eval_batch_size=size)
        assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    rows = pack(ALL, 20)
    assert len(rows) < len(ALL)
    run = trainer(tiny(), tmp_path, heldout=rows)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    left = FocusTrainer(tiny(), arguments(tmp_path), eval_dataset=ALL,
                        data_collator=Collator(pad_token_id=0, side="left"))  # fmt: skip
    assert left.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    run = trainer(tiny(), tmp_path, heldout={"a": SAMPLES[:3], "b": SAMPLES[3:]})
    assert {"eval_a_loss", "eval_b_loss"} <= run.evaluate().keys()


def everything(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool)


def test_held_out_losses_by_the_way_they_are_measured(tmp_path):
    run = trainer(tiny(), tmp_path, heldout=SAMPLES, mask="full", per_device_eval_batch_size=3)
    found = run.heldout_losses()
    deployed, masked = (mean_answer_loss(tiny(), SAMPLES, mask) for mask in (None, everything))
    assert abs(deployed - masked) > 1e-4
    assert found == pytest.approx({"deployed": deployed, "training mask": masked}, rel=1e-6)
    assert run.evaluate()["eval_loss"] == found["deployed"]
    prompt = trainer(tiny(), tmp_path, heldout=SAMPLES[:4], evaluate_on="prompt")
    more = prompt.heldout_losses()
    assert set(more) == {"deployed", "training mask", "as evaluated"}
    assert more["as evaluated"] == prompt.evaluate()["eval_loss"] != more["deployed"]
    same = trainer(tiny(), tmp_path, heldout=SAMPLES, mask="full", eval_mask="full")
    assert list(same.heldout_losses()) == ["deployed", "training mask"]
    assert same.evaluate()["eval_loss"] == pytest.approx(masked, rel=1e-6)


def test_an_evaluation_set_without_answers(tmp_path):
    silent = [sample(8, [], 1)]
    assert trainer(tiny(), tmp_path, heldout=silent).evaluate()["eval_loss"] == 0.0


def test_evaluation_leaves_training_alone(tmp_path):
    """With dropout too: what evaluation draws is not taken from training."""
    quiet = trained(tmp_path, tiny(attention_dropout=0.2))
    seen = trained(tmp_path, tiny(attention_dropout=0.2), heldout=SAMPLES, eval_strategy="steps",
                   eval_steps=1)  # fmt: skip
    assert torch.equal(weights(quiet.model), weights(seen.model))
    assert len(logged(seen, "eval_loss")) == 4


def test_evaluation_changes_nothing(tmp_path, monkeypatch):
    """No fast weights, no gradients, no random numbers, and no label that could be adapted on."""
    run = trainer(tiny(attention_dropout=0.5), tmp_path, heldout=SAMPLES)

    def forbidden(*args, **kwargs):
        raise AssertionError("evaluation must not make fast weights or take gradients")

    monkeypatch.setattr(LoRA, "init", forbidden)
    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    for i, p in enumerate(run.model.parameters()):
        p.grad = torch.full_like(p, float(i))
    before, state = weights(run.model), torch.get_rng_state()
    first = run.evaluate()["eval_loss"]
    assert run.evaluate()["eval_loss"] == first
    assert torch.equal(weights(run.model), before)
    assert all((p.grad == i).all() for i, p in enumerate(run.model.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


def test_adapting_to_prompts_never_sees_an_answer(tmp_path):
    heldout = [s for s in SAMPLES if s["answer_mask"].any()]
    fast = []

    @dataclasses.dataclass(frozen=True)
    class Watching(mf.SGD):
        def update(self, params, grads, state, step, outer):
            found = super().update(params, grads, state, step, outer)
            fast.append(torch.cat([v.flatten() for v in found[0].values()]))
            return found

    def adapted(samples):
        fast.clear()
        run = trainer(
            tiny(),
            tmp_path,
            heldout=samples,
            evaluate_on="prompt",
            per_device_eval_batch_size=3,
            kept={"recipe": {"solver": Watching(1.0, 2)}},
        )
        return run.evaluate()["eval_loss"], torch.stack(fast)  # fmt: skip

    loss, found = adapted(heldout)
    others = copy.deepcopy(heldout)
    for one in others:
        first = int(one["answer_mask"].int().argmax())
        one["input_ids"][first:] = (one["input_ids"][first:] + 5) % 36 + 1
    other_loss, same = adapted(others)
    assert torch.equal(found, same)
    assert loss != other_loss
    assert len(found) == 2 * len(heldout)
    deployed = trainer(tiny(), tmp_path, heldout=heldout).evaluate()["eval_loss"]
    assert loss != pytest.approx(deployed, rel=1e-6)


def test_adapting_to_a_prompt_by_hand(tmp_path):
    one = SAMPLES[3]
    run = trainer(tiny(), tmp_path, heldout=[one], evaluate_on="prompt")
    model, batch = tiny(), COLLATOR([one])
    cut = {k: v[:, :2] for k, v in batch.items()}
    inner = mf.lm_loss(model, adapter=ADAPTER, mask=causal, tokens=mf.all_tokens)
    start = ADAPTER.init(model, torch.Generator().manual_seed(0))
    problem = mf.Problem(inner, inner, lambda _, support: start)
    solver = mf.SGD(1.0, 2, clip=mf.clip_per_tensor(1.0))
    fast = mf.adapt(problem, {}, cut, solver=solver).params
    expected = mf.lm_loss(model, adapter=ADAPTER, mask=causal)(fast, {}, batch)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_packed_rows_have_no_one_prompt():
    with pytest.raises(DataError, match="evaluate_on='prompt'"):
        prompts(COLLATOR(pack(SAMPLES[:2], 32)))


def test_metrics_see_logits_and_labels(tmp_path):
    seen = []

    def measure(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"seen": 1.0}

    for mode in ("deployed", "prompt"):
        run = FocusTrainer(
            tiny(), arguments(tmp_path, evaluate_on=mode), eval_dataset=SAMPLES[:3],
            data_collator=COLLATOR, compute_metrics=measure,
        )  # fmt: skip
        assert run.evaluate()["eval_seen"] == 1.0
    assert seen == [((3, 12, 37), (3, 12))] * 2


# --- what can go wrong -----------------------------------------------------------------------


class Unread(torch.utils.data.Dataset):
    """A data set that is no list."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


class Broken:
    """An inner optimiser whose first `times` uses give NaN."""

    steps = 2

    def __init__(self, times: int):
        self.left = 2 * times

    def init(self, params):
        return ()

    def update(self, params, grads, state, step, outer):
        self.left -= 1
        bad = float("nan") if self.left >= 0 else 1.0
        return {k: v - bad * grads[k] for k, v in params.items()}, state


@pytest.mark.parametrize("estimator", ["first-order", "unrolled"])
def test_a_nan_inner_loop_is_left_out_and_counted(tmp_path, estimator):
    """Fast weights stay at their start, where they change nothing: the step is one of plain SFT."""
    run = trained(tmp_path, estimator=estimator, kept={"recipe": {"solver": Broken(4 + 1)}})
    assert relative(weights(run.model), weights(trained(tmp_path, **SFT).model)) < 1e-13
    assert logged(run, "skipped_adaptations") == [1.0, 2.0, 3.0, 4.0]
    assert logged(run, "fast_weight_shift") == [0.0] * 4


def test_too_many_of_them_stop_the_run(tmp_path):
    run = trainer(tiny(), tmp_path, max_skipped=2, kept={"recipe": {"solver": Broken(100)}})
    with pytest.raises(NonFiniteError, match=r"3 adaptations .* max_skipped=2"):
        run.train()


def test_examples_are_left_out_one_by_one():
    start = {"w": torch.ones(3, 2)}
    values = torch.tensor([[2.0, 2.0], [float("nan"), 2.0], [3.0, 3.0]])

    def estimator(inner_loss, solver, start, outer, support):
        return mf.Solution({"w": values}, torch.tensor([float("nan"), 1.0]))

    records = []
    guarded = Guarded(estimator, records.append, Stopwatch(torch.device("cpu")), per_example=True)
    solution = guarded(lambda *a: torch.zeros(()), mf.SGD(1.0, 1), start, {}, None)
    assert solution.params["w"].tolist() == [[2.0, 2.0], [1.0, 1.0], [3.0, 3.0]]
    assert records[0]["skipped"].item() == 1
    assert solution.losses.tolist() == [0.0, 1.0]


def test_a_nan_outer_loss_stops_before_it_is_saved(tmp_path):
    def factory(model, generator):
        meta = mf.recipes.focusft(model, adapter=ADAPTER, generator=generator)

        def broken(outer, episode):
            loss, aux = meta(outer, episode)
            return loss * float("nan"), aux

        return broken

    run = trainer(tiny(), tmp_path, save_strategy="steps", save_steps=1, logging_steps=100,
                  on_nonfinite="stop", kept={"meta_loss_factory": factory})  # fmt: skip
    with pytest.raises(NonFiniteError, match="training loss was NaN or infinite 1 times at step 0"):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_nan_gradient_stops_before_it_reaches_the_weights(tmp_path):
    """The loss is finite: its derivative at zero is not."""
    seen = []

    def factory(model, generator):
        meta = mf.recipes.focusft(model, adapter=ADAPTER, generator=generator)

        def broken(outer, episode):
            loss, aux = meta(outer, episode)
            seen.append(weights(model))
            if len(seen) == 3:
                loss = loss + (0 * model.model.norm.weight).sqrt().sum()
            return loss, aux

        return broken

    run = trainer(tiny(), tmp_path, logging_steps=100, save_strategy="steps", save_steps=1,
                  on_nonfinite="stop", kept={"meta_loss_factory": factory})  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"gradient norm is nan at step 2\. The model keeps"):
        run.train()
    assert torch.equal(weights(run.model), seen[2]) and not torch.equal(seen[0], seen[2])
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_nan_loss_that_was_not_logged_stops_at_the_end(tmp_path):
    def factory(model, generator):
        meta = mf.recipes.focusft(model, adapter=ADAPTER, generator=generator)

        def broken(outer, episode):
            loss, aux = meta(outer, episode)
            # Without a gradient, so that nothing but the loss tells.
            return loss + float("nan") * torch.ones(()), aux

        return broken

    run = trainer(tiny(), tmp_path, logging_steps=100, kept={"meta_loss_factory": factory})
    with pytest.raises(NonFiniteError, match="training loss was NaN or infinite 4 times by step 4"):
        run.train()


def test_a_step_without_answers_moves_nothing(tmp_path):
    run = trained(tmp_path, samples=[sample(8, [], 1)] * 4, **SGD)
    assert torch.equal(weights(run.model), weights(tiny()))
    assert logged(run, "loss") == [0.0] * 4


def test_a_batch_without_answers_does_not_skew(tmp_path):
    data = [SAMPLES[0], SAMPLES[6], SAMPLES[2]]
    with_it, without = (
        trained(
            tmp_path,
            samples=samples,
            **SGD,
            **ORDER,
            max_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(samples),
            adaptation_start="step",
        )
        for samples in (data, [data[0], data[2]])
    )
    assert relative(weights(with_it.model), weights(without.model)) < 1e-14
    for name in ("inner_loss_first", "adaptation_gain"):
        assert logged(with_it, name) == pytest.approx(logged(without, name), rel=1e-6)


def test_a_sample_longer_than_the_model(tmp_path):
    """In a list it is found at once, in a data set that is not read before, when it is met."""
    long = [*SAMPLES, sample(70, [60], 0)]
    with pytest.raises(DataError, match=r"train_dataset\[8\] has 70 tokens, the model has 64"):
        trainer(tiny(), tmp_path, samples=long)
    with pytest.raises(DataError, match=r"eval_dataset\['a'\]\[0\] has 65 tokens"):
        trainer(tiny(), tmp_path, heldout={"a": [sample(65, [4], 1)]})
    run = trainer(tiny(), tmp_path, samples=Unread(long[-2:]), heldout=Unread(long))
    with pytest.raises(DataError, match="70 tokens in a row, the model has 64 positions"):
        run.train()
    with pytest.raises(DataError, match="70 tokens"):
        run.evaluate()
    packed = {**long[-1], "document_ids": torch.arange(70) // 35}
    assert trainer(tiny(), tmp_path, samples=[packed]).train_dataset == [packed]


def test_narrow_and_mixed_parameters(tmp_path):
    with pytest.warns(UserWarning, match="updates of a small learning rate round to nothing"):
        trainer(tiny(torch.bfloat16), tmp_path)
    model = tiny(torch.float32)
    model.model.layers[0].to(torch.bfloat16)
    with pytest.raises(ProblemError, match=r"torch.bfloat16, torch.float32: .*model.float\(\)"):
        trainer(model, tmp_path)


def test_an_output_directory_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"output_dir='.*file/run' cannot be written to"):
        trainer(tiny(), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
        ({"remove_unused_columns": True}, "would drop answer_mask"),
        ({"estimator": "magic"}, "estimator='magic' is unknown: use one of first-order"),
        ({"mask": "magic"}, "mask='magic' is unknown"),
        ({"inner_tokens": "magic"}, "use one of answer, context, all"),
        ({"evaluate_on": "labels"}, "use one of deployed, prompt"),
        ({"inner_steps": -1}, "inner_steps must be finite and >= 0, got -1"),
        ({"inner_clip": 0.0}, "inner_clip must be finite and > 0, got 0.0"),
        ({"layer_fraction": 1.5}, "must lie in"),
        ({"lora_rank": 0}, "lora_rank must be finite and >= 1, got 0"),
        ({"lora_alpha": -1.0}, "lora_alpha must be finite and > 0, got -1.0"),
        ({"max_skipped": -1}, "max_skipped must be >= 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused(tmp_path, changes, text):
    with pytest.raises(ValueError, match=text):
        trainer(tiny(), tmp_path, **changes)


def test_a_loss_function_of_ones_own_is_refused(tmp_path):
    with pytest.raises(ProblemError, match="meta_loss_factory"):
        FocusTrainer(tiny(), arguments(tmp_path), data_collator=COLLATOR, compute_loss_func=print)


def test_no_padding_token(tmp_path):
    with pytest.raises(DataError, match="no padding token"):
        FocusTrainer(tiny(), arguments(tmp_path), train_dataset=SAMPLES)


# --- the ecosystem ---------------------------------------------------------------------------


def test_a_checkpoint_is_a_vanilla_one(tmp_path):
    run = trained(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float64)
    assert loaded.state_dict().keys() == tiny().state_dict().keys()
    assert torch.equal(weights(loaded), weights(run.model))


def test_fast_weights_are_nobodys_parameters(tmp_path):
    """The gradient norm that is clipped is that of the model alone."""
    run = trained(tmp_path, max_steps=1, **ORDER)
    model, batch = tiny(), COLLATOR(SAMPLES[:2])
    generator = torch.Generator().manual_seed(start_seed(0, 0, 0))
    meta = mf.recipes.focusft(model, adapter=ADAPTER, generator=generator)
    meta({}, mf.Episode(batch, batch))[0].backward()
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
    assert logged(run, "grad_norm") == pytest.approx([norm], rel=1e-10)
    assert len(run.optimizer.param_groups[0]["params"]) + len(
        run.optimizer.param_groups[1]["params"]
    ) == len(list(model.parameters()))


def test_global_random_state_is_not_touched(tmp_path):
    """Paired with plain fine-tuning: dropout and data order do not depend on the inner loop."""
    states = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            states[-1].append(torch.get_rng_state())

    for changes in (SFT, {}):
        states.append([])
        trained(tmp_path, callbacks=[Look()], **changes)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_any_arguments_with_options_beside_them(tmp_path):
    from transformers import TrainingArguments

    ours = arguments(tmp_path, max_steps=1)
    names = {f.name for f in dataclasses.fields(FocusOptions)}
    options = {f: getattr(ours, f) for f in names}
    plain = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", seed=11,
        dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    run = FocusTrainer(tiny(), plain, focus=FocusOptions(**options), train_dataset=SAMPLES,
                       data_collator=COLLATOR)  # fmt: skip
    run.train()
    assert torch.equal(weights(run.model), weights(trained(tmp_path, max_steps=1).model))
    assert isinstance(run, Trainer) and isinstance(ours, FocusArguments)


@pytest.mark.filterwarnings("ignore")
def test_inside_trl(capsys):
    pytest.importorskip("trl")
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parent.parent / "examples" / "trl_sft.py"
    spec = importlib.util.spec_from_file_location("trl_sft", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    run = example.main(steps=1)
    assert logged(run, "inner_loss_last") < logged(run, "inner_loss_first")
    batch = as_batch(run.data_collator([run.eval_dataset[i] for i in range(4)]))
    loss = mf.lm_loss(run.model, adapter=mf.LoRA(lambda model: ()), mask=causal)({}, {}, batch)
    assert logged(run, "eval_loss") == pytest.approx([loss.item()], rel=1e-5)


def test_ranks_that_receive_different_signals_end_alike(tmp_path, monkeypatch):
    """This rank has SIGTERM and another one SIGINT, whose numbers have the mean of SIGFPE."""
    run = trainer(tiny(), tmp_path)
    run._signals.received = signal.SIGTERM
    monkeypatch.setattr(run, "_over_ranks", lambda found: found + torch.tensor([0, 0, 0, 1.0]))
    run._get_grad_norm(run.model, grad_norm=torch.ones(()))
    assert run._stop_by == signal.SIGTERM
