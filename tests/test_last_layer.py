"""The last layer at scored positions only: nothing that is read changes."""

from __future__ import annotations

import pytest
from models import (
    FAMILIES,
    MLP,
    NAMES,
    build,
    build_exact,
    chat_batch,
    default_attn,
    grads,
    relative,
)
from torch import nn

import metafocus as mf
from metafocus.lm import loss as lm
from metafocus.lm.hf.last_layer import last_layer


def step(model, batch, **options):
    """The loss, the inner losses and the gradient of all parameters."""
    model.zero_grad()
    names = MLP.get(model.config.model_type, (*NAMES, "q_proj", "o_proj"))
    adapter = mf.LoRA(mf.top_layers(0.5, names), 4)
    meta = mf.recipes.focusft(model, adapter=adapter, **options)
    loss, aux = meta({}, mf.Episode(batch, batch))
    loss.backward()
    return loss.detach(), aux.inner_losses, grads(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_stay(family, checkpointing, monkeypatch):
    attn = default_attn(family)
    make = build if "gemma" in family else build_exact
    model = make(family=family, attn=attn, checkpointing=checkpointing)
    assert last_layer(model) is not None
    found = step(model, chat_batch())
    monkeypatch.setattr(lm, "restriction", lambda *args: None)
    expected = step(model, chat_batch())
    # Norms of Gemma round to float32.
    bound = 1e-6 if "gemma" in family else 1e-12
    for got, want in zip(found, expected, strict=True):
        assert relative(got, want) < bound


@pytest.mark.parametrize("length", [24, 96])
@pytest.mark.parametrize("estimator", [mf.Unrolled(), mf.Unrolled(recompute=True)])
def test_second_derivatives_stay(estimator, length, monkeypatch):
    model = build_exact(max_position_embeddings=96)
    found = step(model, chat_batch(length), estimator=estimator)
    monkeypatch.setattr(lm, "restriction", lambda *args: None)
    for got, want in zip(found, step(model, chat_batch(length), estimator=estimator), strict=True):
        assert relative(got, want) < 1e-11  # the same sums, in another order, twice derived


def test_the_mlp_sees_scored_positions_only():
    model, batch = build_exact(), chat_batch()
    step(model, batch)
    seen = []
    mlp = model.model.layers[-1].mlp
    mlp.gate_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    step(model, batch)
    scored = int(batch["answer_mask"].sum())
    # Two inner passes and the outer one; what ran before are checks of two tokens.
    assert seen[-3:] == [(1, scored, 32)] * 3
    assert (2, 24, 32) not in seen


def test_a_layer_that_mixes_positions_after_its_attention_runs_as_a_whole():
    class Mixing(nn.Module):
        def forward(self, x):
            return x.cumsum(-2)

    model = build_exact()
    assert last_layer(model) is not None
    model.model.layers[-1].mlp = Mixing()
    assert last_layer(model) is None
