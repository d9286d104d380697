"""The training loop: against a loop written by hand, and against per-token sums."""

from __future__ import annotations

import copy
import math
from itertools import islice

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import metafocus as mf
from metafocus.adapters import LoRA, top_layers
from metafocus.data import Collator, pack
from metafocus.errors import NonFiniteError
from metafocus.training import Schedule, batches, evaluate, plain_sft, train

VOCAB = 37
COLLATOR = Collator(pad_token_id=0)
ADAPTER = LoRA(top_layers(0.5, ("gate_proj", "up_proj", "down_proj")), rank=2, alpha=4.0)


def tiny(dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def sample(length: int, answers: list[int], seed: int) -> dict[str, Tensor]:
    """A sample of one context turn and one answer turn, with the answers where they are said."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(length, dtype=torch.bool)
    mask[answers] = True
    return {
        "input_ids": torch.randint(1, VOCAB, (length,), generator=generator),
        "turn_ids": torch.tensor([0 if i < min(answers) else 1 for i in range(length)]),
        "answer_mask": mask,
    }


SAMPLES = [
    sample(9, [6, 7, 8], 0),
    sample(5, [4], 1),
    sample(12, [3, 4, 5, 6, 7, 8, 9, 10], 2),
    sample(7, [2, 3, 6], 3),
    sample(6, [5], 4),
]


def weights(model) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def focusft(model, seed: int = 0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return mf.recipes.focusft(model, adapter=ADAPTER, generator=generator, **kwargs)


METHODS = {"sft": lambda model: plain_sft(model, mf.masks.causal), "focusft": focusft}


# --- schedule and order ----------------------------------------------------------------------


def test_factor_warms_up_linearly_and_falls_as_a_cosine():
    schedule = Schedule(10, warmup=0.2)
    cosine = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert [schedule.factor(i) for i in range(10)] == pytest.approx([0.5, 1.0, *cosine])
    assert schedule.factor(9) < 0.04
    assert schedule.factor(10) == pytest.approx(0.0, abs=1e-12)


def test_factor_at_the_edges():
    assert Schedule(1).factor(0) == 1.0
    assert Schedule(4, warmup=0.0).factor(0) == 1.0
    assert [Schedule(4, warmup=1.0).factor(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    factors = [Schedule(1000).factor(i) for i in range(1000)]
    assert max(factors) == 1.0 and factors[99] == 1.0 and min(factors) > 0
    assert factors[-1] < 1e-5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", -3),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", -1e-5),
        ("lr", math.nan),
        ("clip", 0.0),
        ("warmup", -0.1),
        ("warmup", 1.1),
        ("warmup", math.nan),
    ],
)
def test_schedule_refuses(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*{value}"):
        Schedule(**{"steps": 3, name: value})


@pytest.mark.parametrize(("size", "batch_size"), [(7, 3), (6, 2), (3, 5), (1, 2), (5, 5)])
def test_batches_cover_every_index_once_an_epoch(size, batch_size):
    epochs = 6
    found = list(islice(batches(size, batch_size, seed=4), epochs * size))
    assert all(len(batch) == batch_size for batch in found)
    stream = [i for batch in found for i in batch]
    orders = [stream[e * size : (e + 1) * size] for e in range(epochs)]
    for order in orders:
        assert sorted(order) == list(range(size))
    if size > 4:
        assert len({tuple(order) for order in orders}) > 1


def test_batches_depend_on_their_seed_alone():
    def first(seed):
        return list(islice(batches(20, 3, seed), 15))

    before = torch.get_rng_state()
    reference = first(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert first(1) == reference
    assert first(2) != reference


# --- train -----------------------------------------------------------------------------------


def by_hand(model, meta_loss, schedule: Schedule):
    """The same training without metafocus.training: AdamW, warm-up, cosine, clipped gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.999)
    )
    generator = torch.Generator().manual_seed(schedule.seed)
    order: list[int] = []
    losses, norms = [], []
    for step in range(schedule.steps):
        while len(order) < schedule.batch_size:
            order += torch.randperm(len(SAMPLES), generator=generator).tolist()
        chosen, order = order[: schedule.batch_size], order[schedule.batch_size :]
        batch = COLLATOR([SAMPLES[i] for i in chosen])
        warm = math.ceil(schedule.warmup * schedule.steps)
        factor = (
            (step + 1) / warm
            if step < warm
            else (1 + math.cos(math.pi * (step - warm) / (schedule.steps - warm))) / 2
        )
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * factor
        model.zero_grad()
        loss, _ = meta_loss({}, mf.Episode(batch, batch))
        loss.backward()
        norm = sum(p.grad.square().sum() for p in parameters).sqrt()
        for p in parameters:
            p.grad *= min(1.0, schedule.clip / (norm.item() + 1e-6))
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_train_equals_a_loop_by_hand(method, clip):
    schedule = Schedule(6, batch_size=2, lr=1e-2, warmup=0.3, clip=clip, seed=11)
    ours, theirs = tiny(torch.float64), tiny(torch.float64)
    history = train(ours, METHODS[method](ours), SAMPLES, COLLATOR, schedule, progress=False)
    losses, norms = by_hand(theirs, METHODS[method](theirs), schedule)
    assert history.loss == pytest.approx(losses, rel=1e-9)
    assert history.grad_norm == pytest.approx(norms, rel=1e-7)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


def test_plain_sft_is_the_loss_of_transformers():
    model, batch = tiny(torch.float64), COLLATOR(SAMPLES[:3])
    loss, aux = plain_sft(model, mf.masks.causal)({}, mf.Episode(batch, batch))
    labels = torch.where(batch["answer_mask"], batch["input_ids"], -100)
    theirs = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
    ).loss
    # transformers computes the cross entropy in float32.
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert aux.inner_losses.numel() == 0 and aux.params == {}


@pytest.mark.parametrize("method", METHODS)
def test_train_reduces_the_loss(method):
    model = tiny()
    schedule = Schedule(20, batch_size=5, lr=1e-2)
    before = evaluate(model, SAMPLES, COLLATOR, mask=mf.masks.causal)
    history = train(model, METHODS[method](model), SAMPLES, COLLATOR, schedule, progress=False)
    assert history.loss[-1] < 0.7 * history.loss[0]
    assert evaluate(model, SAMPLES, COLLATOR, mask=mf.masks.causal) < 0.7 * before


@pytest.mark.parametrize("method", METHODS)
def test_history_has_every_step(method):
    model = tiny()
    history = train(
        model, METHODS[method](model), SAMPLES, COLLATOR, Schedule(3, 2), progress=False
    )
    columns = (history.loss, history.grad_norm, history.inner_first, history.inner_last)
    assert [len(column) for column in columns] == [3] * 4
    assert all(math.isfinite(x) for x in history.loss + history.grad_norm)
    if method == "sft":
        assert history.inner_first == history.inner_last == [None] * 3
    else:
        # Fast weights start at zero: the first inner loss is that of the plain model.
        assert all(
            last < first
            for first, last in zip(history.inner_first, history.inner_last, strict=True)
        )


def test_inner_losses_are_those_before_the_first_and_the_last_step():
    model = tiny(torch.float64)
    batch = COLLATOR(SAMPLES)
    _, aux = focusft(copy.deepcopy(model), solver=mf.SGD(0.5, steps=3))(
        {}, mf.Episode(batch, batch)
    )
    meta_loss = focusft(model, solver=mf.SGD(0.5, steps=3))
    schedule = Schedule(1, batch_size=len(SAMPLES))
    history = train(model, meta_loss, SAMPLES, COLLATOR, schedule, progress=False)
    # The one batch holds all samples in another order.
    assert history.inner_first == pytest.approx([aux.inner_losses[0].item()])
    assert history.inner_last == pytest.approx([aux.inner_losses[-1].item()])


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits(method):
    def once(seed: int, noise: int):
        model = tiny()
        torch.manual_seed(noise)
        schedule = Schedule(4, batch_size=2, lr=1e-2, seed=seed)
        history = train(model, METHODS[method](model), SAMPLES, COLLATOR, schedule, progress=False)
        return history, weights(model)

    (history, first), (again, second), (other, third) = once(1, 0), once(1, 5), once(2, 0)
    assert history == again
    assert_same(first, second)
    assert history.loss != other.loss
    assert any(not torch.equal(first[k], third[k]) for k in first)


def test_fast_weights_have_a_generator_of_their_own():
    def once(seed: int):
        model = tiny()
        schedule = Schedule(3, batch_size=2, lr=1e-2)
        return train(model, focusft(model, seed), SAMPLES, COLLATOR, schedule, progress=False)

    before = torch.get_rng_state()
    model = tiny()
    torch.set_rng_state(before)
    train(model, focusft(model), SAMPLES, COLLATOR, Schedule(3, 2), progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert once(1) == once(1)
    # Another draw of A: the loss before the first inner step is the same, after it is not.
    assert once(1).inner_first[0] == once(2).inner_first[0]
    assert once(1).loss[0] != once(2).loss[0]


def test_frozen_parameters_stay():
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    before = weights(model)
    train(model, focusft(model), SAMPLES, COLLATOR, Schedule(2, 2, lr=1e-2), progress=False)
    changed = {k for k, v in weights(model).items() if not torch.equal(v, before[k])}
    assert changed == {k for k, p in model.named_parameters() if p.requires_grad}


def test_state_dict_keys_and_gradients_afterwards():
    model = tiny()
    keys = list(model.state_dict())
    train(model, focusft(model), SAMPLES, COLLATOR, Schedule(2, 2), progress=False)
    assert list(model.state_dict()) == keys
    assert all(p.grad is None for p in model.parameters())


def test_nothing_to_train():
    model = tiny()
    with pytest.raises(ValueError, match="0 samples"):
        train(model, focusft(model), [], COLLATOR, Schedule(2), progress=False)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="0 parameters"):
        train(model, focusft(model), SAMPLES, COLLATOR, Schedule(2), progress=False)


def test_progress_bar(capsys):
    model = tiny()
    train(model, focusft(model), SAMPLES, COLLATOR, Schedule(2, 2))
    out, err = capsys.readouterr()
    assert out == "" and "2/2" in err and "loss=" in err and "inner=" in err
    train(model, focusft(model), SAMPLES, COLLATOR, Schedule(2, 2), progress=False)
    assert capsys.readouterr() == ("", "")


# --- what is not finite ----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_weights(bad):
    model = tiny()
    good, seen = focusft(model), []

    def meta_loss(outer, episode):
        seen.append(weights(model))
        loss, aux = good(outer, episode)
        return (loss * bad if len(seen) == 3 else loss), aux

    with pytest.raises(NonFiniteError, match=rf"outer loss is {bad} at step 2\."):
        train(model, meta_loss, SAMPLES, COLLATOR, Schedule(5, 2, lr=1e-2), progress=False)
    assert len(seen) == 3
    assert_same(weights(model), seen[2])
    assert any(not torch.equal(seen[0][k], seen[2][k]) for k in seen[0])


def test_a_gradient_that_is_not_finite_leaves_the_weights():
    model = tiny()
    before = weights(model)
    good = focusft(model)

    def meta_loss(outer, episode):
        loss, aux = good(outer, episode)
        return loss + (0 * model.model.norm.weight).sqrt().sum(), aux

    with pytest.raises(NonFiniteError, match=r"outer gradient norm is nan at step 0\."):
        train(model, meta_loss, SAMPLES, COLLATOR, Schedule(2, 2), progress=False)
    assert_same(weights(model), before)


def test_an_inner_loss_that_is_not_finite_leaves_the_weights():
    model = tiny()
    before = weights(model)
    meta_loss = focusft(model, solver=mf.SGD(1e30, steps=3))
    with pytest.raises(NonFiniteError, match="inner_loss is nan"):
        train(model, meta_loss, SAMPLES, COLLATOR, Schedule(2, 2), progress=False)
    assert_same(weights(model), before)


# --- evaluate --------------------------------------------------------------------------------


@torch.no_grad()
def per_token(model, ids: Tensor, answers: Tensor, mask: Tensor | None = None) -> list[float]:
    """Minus the log probability of each answer token, one sequence at a time."""
    logits = model(input_ids=ids[None], attention_mask=mask, use_cache=False).logits[0]
    table = logits.double().log_softmax(-1)
    return [-table[i - 1, ids[i]].item() for i in range(1, len(ids)) if answers[i]]


def naive(model, samples) -> float:
    model.eval()
    losses = [x for s in samples for x in per_token(model, s["input_ids"], s["answer_mask"])]
    return sum(losses) / len(losses)


# The last sample begins with an answer token, as one that was cut on its left side does.
ALL = [*SAMPLES, sample(8, [0, 1, 5], 7)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_evaluate_is_the_mean_over_tokens(side, batch_size):
    model = tiny(torch.float64)
    collator = Collator(pad_token_id=0, side=side)
    found = evaluate(model, ALL, collator, mask=mf.masks.causal, batch_size=batch_size)
    assert found == pytest.approx(naive(model, ALL), rel=1e-7)


def test_evaluate_packed_rows():
    model = tiny(torch.float64)
    rows = pack(ALL, 20)
    assert len(rows) < len(ALL)
    found = evaluate(model, rows, COLLATOR, mask=mf.masks.causal, batch_size=2)
    assert found == pytest.approx(naive(model, ALL), rel=1e-7)


def test_evaluate_honours_the_mask():
    model = tiny(torch.float64)
    model.eval()
    losses = []
    for s in SAMPLES:
        everything = torch.ones(1, 1, *[len(s["input_ids"])] * 2, dtype=torch.bool)
        losses += per_token(model, s["input_ids"], s["answer_mask"], everything)
    found = evaluate(model, SAMPLES, COLLATOR, mask=mf.masks.full, batch_size=2)
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-7)
    causal = evaluate(model, SAMPLES, COLLATOR, mask=mf.masks.causal, batch_size=2)
    assert abs(found - causal) > 1e-4


def test_evaluate_without_answers_is_zero():
    silent = {**SAMPLES[0], "answer_mask": torch.zeros(9, dtype=torch.bool)}
    assert evaluate(tiny(), [silent], COLLATOR, mask=mf.masks.causal) == 0.0


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_changes_nothing(training):
    model = tiny()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train(training)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(i))
    before, state = weights(model), torch.get_rng_state()
    first = evaluate(model, SAMPLES, COLLATOR, mask=mf.masks.causal)
    assert evaluate(model, SAMPLES, COLLATOR, mask=mf.masks.causal) == first
    assert model.training is training
    assert all(m.training is training for m in model.modules())
    assert_same(weights(model), before)
    assert all((p.grad == i).all() for i, p in enumerate(model.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluate_never_adapts(monkeypatch):
    model = tiny()
    expected = naive(model, SAMPLES)
    train(model, focusft(model), SAMPLES, COLLATOR, Schedule(1, 2, lr=1e-12), progress=False)

    def forbidden(*args, **kwargs):
        raise AssertionError("evaluation must not make fast weights or take gradients")

    monkeypatch.setattr(LoRA, "init", forbidden)
    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = evaluate(model, SAMPLES, COLLATOR, mask=mf.masks.causal, batch_size=2)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(passes) == 3
