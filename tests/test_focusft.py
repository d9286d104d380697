"""FocuSFT against the published algorithm, written here naively and independently."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from models import NAMES, build, build_exact, chat_batch, grads, relative
from torch import nn

import metafocus as mf
from metafocus.recipes import focusft

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

RANK, ALPHA, STEPS, LR, CLIP = 4, 8.0, 3, 1.0, 1.0


class NaiveLoRA(nn.Module):
    def __init__(self, base, a, b):
        super().__init__()
        self.base, self.a, self.b = base, a, b

    def forward(self, x):
        return self.base(x) + ALPHA / RANK * (x @ self.a.T @ self.b.T)


def naive_mask(batch):
    """The turn mask token by token, additive."""
    turns, answers, valid = batch["turn_ids"], batch["answer_mask"], batch["attention_mask"]
    size = turns.shape[1]
    mask = torch.full((len(turns), 1, size, size), torch.finfo(torch.float32).min).double()
    for b in range(len(turns)):
        for i in range(size):
            for k in range(size):
                same_block = turns[b, i] == turns[b, k] and not answers[b, i]
                if valid[b, i] and valid[b, k] and (k <= i or same_block):
                    mask[b, 0, i, k] = 0
    return mask


def naive_focusft(model, batch, start):
    """Adapt A and B on the answers, then take the outer gradient with them held constant."""
    model = copy.deepcopy(model)
    fast = {name: value.clone().requires_grad_() for name, value in start.items()}
    for path in {name.rpartition(".")[0] for name in fast}:
        parent, _, child = path.rpartition(".")
        base = model.get_submodule(path)
        lora = NaiveLoRA(base, fast[f"{path}.lora_A"], fast[f"{path}.lora_B"])
        setattr(model.get_submodule(parent), child, lora)
    mask = naive_mask(batch)

    def loss():
        logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
        total, count = 0.0, 0
        for b in range(len(logits)):
            for t in range(1, logits.shape[1]):
                if batch["answer_mask"][b, t]:
                    target = batch["input_ids"][b, t]
                    total = total - F.log_softmax(logits[b, t - 1], -1)[target]
                    count += 1
        return total / count

    inner = []
    for _ in range(STEPS):
        value = loss()
        inner.append(value.item())
        found = torch.autograd.grad(value, list(fast.values()))
        with torch.no_grad():
            for p, g in zip(fast.values(), found, strict=True):
                norm = math.sqrt((g * g).sum().item())
                p -= LR * (g * CLIP / norm if norm > CLIP else g)
    for p in fast.values():
        p.requires_grad_(False)
    outer = loss()
    outer.backward()
    return outer.item(), inner, fast, grads(model)


def ours(model, batch, estimator=None, seed=7, **options):
    adapter = mf.LoRA(mf.top_layers(0.75, NAMES), RANK, ALPHA)
    meta = focusft(
        model,
        adapter=adapter,
        solver=mf.SGD(LR, STEPS, clip=mf.clip_per_tensor(CLIP)),
        estimator=estimator,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    loss, aux = meta({}, mf.Episode(batch, batch))
    loss.backward()
    return loss, aux, adapter


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_parity_with_the_published_algorithm(family, attn, checkpointing):
    batch = chat_batch()
    model = build(family, attn)
    adapter = mf.LoRA(mf.top_layers(0.75, NAMES), RANK, ALPHA)
    start = adapter.init(model, torch.Generator().manual_seed(7))
    assert len({name.split(".")[2] for name in start}) == 3
    loss, inner, fast, expected = naive_focusft(model, batch, start)

    model = build(family, attn, checkpointing=checkpointing)
    got, aux, _ = ours(model, batch)
    # The same operations in float64, but in another order: a few hundred roundings of 1e-16.
    # Hugging Face's float32 softmax and norms cancel, being the same.
    assert got.item() == pytest.approx(loss, rel=1e-9)
    assert aux.inner_losses.tolist() == pytest.approx(inner, rel=1e-9)
    for name, value in aux.params.items():
        assert relative(value, fast[name].detach()) < 1e-8, name
        assert name.endswith("lora_A") or value.norm() > 1e-3  # B has left zero
    assert relative(grads(model), expected) < 1e-9


def test_parity_has_teeth():
    """Plain fine-tuning, and the same steps under a causal mask, give another gradient."""
    batch = chat_batch()
    model = build()
    start = mf.LoRA(mf.top_layers(0.75, NAMES), RANK, ALPHA).init(
        model, torch.Generator().manual_seed(7)
    )
    *_, expected = naive_focusft(model, batch, start)
    causal = build()
    ours(causal, batch, mask=mf.masks.causal)
    assert relative(grads(causal), expected) > 1e-2
    sft = build()
    focusft(sft, adapter=mf.LoRA(mf.top_layers(0.0, NAMES)))({}, mf.Episode(batch, batch))[
        0
    ].backward()
    assert relative(grads(sft), expected) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    "estimator",
    [mf.Unrolled(recompute=True), mf.Unrolled(recompute=2), mf.Unrolled(hvp=mf.hvp_forward)],
    ids=str,
)
def test_second_order_forms_agree(estimator, checkpointing):
    expected = build_exact()
    ours(expected, chat_batch(), mf.Unrolled())
    model = build_exact(checkpointing=checkpointing)
    ours(model, chat_batch(), estimator)
    # float64 throughout: the norms are torch's, and sdpa does not round.
    assert relative(grads(model), grads(expected)) < 1e-12


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_graph_unroll_with_checkpointing(checkpointing):
    expected = build_exact()
    ours(expected, chat_batch(), mf.Unrolled(recompute=True))
    model = build_exact(checkpointing=checkpointing)
    ours(model, chat_batch(), mf.Unrolled())
    assert relative(grads(model), grads(expected)) < 1e-12


def test_sixteen_inner_steps_recomputed_equal_the_graph():
    """The form whose memory is flat (test_memory.py), where it matters."""
    found = []
    for estimator in (mf.Unrolled(), mf.Unrolled(recompute=True)):
        model = build_exact()
        adapter = mf.LoRA(mf.top_layers(0.75, NAMES), RANK, ALPHA)
        meta = focusft(model, adapter=adapter, solver=mf.SGD(0.1, 16), estimator=estimator)
        meta({}, mf.Episode(chat_batch(), chat_batch()))[0].backward()
        found.append(grads(model))
    # float64; sixteen steps of the same operations, summed in another order.
    assert relative(found[1], found[0]) < 1e-12


def test_second_order_is_the_derivative():
    """Central differences of the whole map, along the gradient and a random direction."""
    batch = chat_batch()
    model = build_exact()
    ours(model, batch, mf.Unrolled(recompute=True))
    gradient = grads(model)
    generator = torch.Generator().manual_seed(1)
    for direction in (gradient, torch.randn(gradient.shape, generator=generator).double()):
        direction = direction / direction.norm()
        values = []
        step = 1e-4
        for sign in (1, -1):
            moved = build_exact()
            with torch.no_grad():
                offset = 0
                for p in moved.parameters():
                    p += sign * step * direction[offset : offset + p.numel()].view_as(p)
                    offset += p.numel()
            values.append(ours(moved, batch, mf.FirstOrder())[0].item())
        slope = (values[0] - values[1]) / (2 * step)
        # Error step^2 times the third derivative, about 1e-6 here, and 1e-12 of rounding.
        assert slope == pytest.approx((gradient @ direction).item(), rel=1e-4, abs=1e-7)


def test_fraction_zero_is_plain_fine_tuning():
    batch = chat_batch()
    model = build()
    meta = focusft(model, adapter=mf.LoRA(mf.top_layers(0.0, NAMES)), mask=mf.masks.causal)
    loss, aux = meta({}, mf.Episode(batch, batch))
    loss.backward()
    assert aux.params == {} and aux.inner_losses.shape == (0,)

    plain = build()
    labels = torch.where(batch["answer_mask"], batch["input_ids"], -100)
    logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    # The mask is boolean here and built by transformers there: the same arithmetic otherwise.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative(grads(model), grads(plain)) < 1e-9


def test_model_stays_plain():
    model = build()
    keys = list(model.state_dict())
    rng = torch.get_rng_state()
    ours(model, chat_batch())
    assert list(model.state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), rng)
    assert sum(1 for _ in model.parameters()) == sum(1 for _ in build().parameters())


def test_fresh_start_at_every_call_and_reproducible():
    batch = chat_batch()

    def run():
        meta = focusft(
            build(),
            adapter=mf.LoRA(mf.top_layers(0.5, NAMES), RANK, ALPHA),
            generator=torch.Generator().manual_seed(3),
        )
        return [meta({}, mf.Episode(batch, batch))[1].params for _ in range(2)]

    first, second = run()
    again = run()
    name = next(iter(first))
    assert not torch.equal(first[name], second[name])
    assert all(torch.equal(first[k], again[0][k]) for k in first)
    assert all(torch.equal(second[k], again[1][k]) for k in second)


def test_one_step_leaves_A_where_it_was():
    """At B = 0 the gradient of A is zero: with K = 1 only B moves."""
    model = build()
    adapter = mf.LoRA(mf.top_layers(0.5, NAMES), RANK, ALPHA)
    meta = focusft(
        model,
        adapter=adapter,
        solver=mf.SGD(1.0, steps=1),
        generator=torch.Generator().manual_seed(3),
    )
    _, aux = meta({}, mf.Episode(chat_batch(), chat_batch()))
    start = adapter.init(model, torch.Generator().manual_seed(3))
    for name, value in aux.params.items():
        assert torch.equal(value, start[name]) == name.endswith("lora_A")


def test_adam_inner_loop_second_order_is_finite():
    """LoRA's B = 0 makes exactly zero gradients of A: no NaN from the square root."""
    model = build()
    meta = focusft(
        model,
        adapter=mf.LoRA(mf.top_layers(0.5, NAMES), RANK, ALPHA),
        solver=mf.Adam(0.01, steps=2),
        estimator=mf.Unrolled(),
    )
    loss, _ = meta({}, mf.Episode(chat_batch(), chat_batch()))
    loss.backward()
    assert torch.isfinite(grads(model)).all() and grads(model).norm() > 0


def test_frozen_parameters_get_no_gradient():
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.3" in name)
    ours(model, chat_batch(), mf.Unrolled(recompute=True))
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.norm() > 0) == ("layers.3" in name), name
