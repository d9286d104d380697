"""Prepared batches: what was made for another mask or from other tensors is made anew."""

from __future__ import annotations

import architectures
import pytest
import torch
from models import NAMES, build, build_exact, chat_batch

import metafocus as mf
from metafocus import masks
from metafocus.errors import ProblemError
from metafocus.lm.per_example import PerExampleLoss
from metafocus.lm.shared_prefix import SharedPrefix

LORA = mf.LoRA(mf.top_layers(0.5, NAMES), 2)


def loss_of(model, mask=masks.context_bidirectional, kind=None):
    if kind is not None:
        return kind(model, LORA, mask, mf.answer_tokens)
    return mf.lm_loss(model, adapter=LORA, mask=mask)


@pytest.mark.parametrize("kind", [None, PerExampleLoss])
def test_another_mask_is_not_taken_over(kind):
    model, batch = build_exact(), chat_batch()
    fast = LORA.init(model)
    causal, context = (loss_of(model, m, kind) for m in (masks.causal, masks.context_bidirectional))
    want = context(fast, {}, batch).item()
    assert want != causal(fast, {}, batch).item()
    assert context(fast, {}, causal.prepare(batch)).item() == want


@pytest.mark.parametrize("kind", [None, PerExampleLoss])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", ["input_ids", "answer_mask", "turn_ids", "attention_mask"])
def test_changed_tensors_are_read_again(name, in_place, kind):
    model, batch, other = build_exact(), chat_batch(), chat_batch(seed=1)
    other["answer_mask"] = other["answer_mask"].logical_xor(other["turn_ids"] == 0)
    # Each token is a turn of its own.
    other["turn_ids"] = torch.where(other["turn_ids"] >= 0, torch.arange(24), -1)
    other["attention_mask"] = other["attention_mask"].clone()
    other["attention_mask"][1, 15:] = 0
    fast, loss = LORA.init(model), loss_of(model, masks.prefix_lm, kind)
    if name == "turn_ids":
        loss = loss_of(model, kind=kind)
    want = loss(fast, {}, {**batch, name: other[name]}).item()
    prepared = loss.prepare({k: v.clone() for k, v in batch.items()})
    before = loss(fast, {}, prepared).item()
    if in_place:
        prepared[name].copy_(other[name])
    else:
        prepared = {**prepared, name: other[name]}
    assert before != want
    assert loss(fast, {}, prepared).item() == want


def test_hidden_states_of_other_tokens_are_dropped():
    model, batch = build_exact(), chat_batch()
    shared = SharedPrefix(loss_of(model))
    prepared = shared({}, shared.loss.prepare(batch))
    assert "hidden" in shared.loss.prepare(prepared)
    prepared["input_ids"][0, 3] += 1
    assert "hidden" not in shared.loss.prepare(prepared)


def test_a_mask_that_changes_between_calls():
    """Spans are remembered by their memory, not by the policy that made them."""

    class Window:
        size = 24

        def __call__(self, batch):
            return masks.spans.windowed(masks.causal(batch), self.size)

    model, batch, window = build_exact(), chat_batch(), Window()
    fast, loss = LORA.init(model), loss_of(model, window)
    wide = loss(fast, {}, batch).item()
    window.size = 4
    narrow = loss_of(model, lambda batch: masks.spans.windowed(masks.causal(batch), 4))
    assert loss(fast, {}, batch).item() == narrow(fast, {}, batch).item() != wide


def test_tokens_that_are_written_to_between_calls():
    """As a loader does that fills the same memory again."""
    model, batch, other = build_exact(), chat_batch(), chat_batch(seed=1)
    other["turn_ids"] = torch.where(other["turn_ids"] >= 0, torch.arange(24), -1)
    meta = mf.recipes.focusft(model, adapter=LORA)
    given = {k: v.clone() for k, v in batch.items()}
    meta({}, mf.Episode(given, given))
    for name, value in other.items():
        given[name].copy_(value)
    found = meta({}, mf.Episode(given, given))[0].item()
    again = mf.recipes.focusft(build_exact(), adapter=LORA)
    again({}, mf.Episode(batch, batch))
    assert found == again({}, mf.Episode(other, other))[0].item()


def test_prepared_for_many_tasks():
    """Under vmap a prepared batch is known by the memory behind its tensors."""
    loss, batch = loss_of(build()), chat_batch()
    fast = LORA.init(loss.model)

    def each(ids):
        prepared = loss.prepare({**batch, "input_ids": ids})
        assert loss.prepare(prepared) is prepared
        return loss(fast, {}, prepared)

    ids = torch.stack([batch["input_ids"], batch["input_ids"].flip(1)])
    found = torch.func.vmap(each)(ids)
    want = torch.stack([loss(fast, {}, {**batch, "input_ids": x}) for x in ids])
    assert torch.allclose(found, want, rtol=1e-6)


def test_a_router_with_a_loss_of_its_own_is_refused():
    model = architectures.build("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(ProblemError, match=r"config\.output_router_logits=True.*set it to False"):
        mf.lm_loss(model, adapter=mf.NoAdapter(), mask=masks.causal)
