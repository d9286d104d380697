"""Whether the inner loop of FocuSFT keeps its activations: same numbers, by the free memory."""

from __future__ import annotations

import logging

import pytest
import torch
from models import NAMES, build_exact, chat_batch, grads, relative

import metafocus as mf
from metafocus.errors import ProblemError
from metafocus.lm.hf import checkpointing, inner_memory


def step(monkeypatch, batch, **options):
    """The gradient, and how many layers were checkpointed."""
    model = build_exact(checkpointing=True)
    seen, checkpoint = [], checkpointing.checkpoint_layer
    monkeypatch.setattr(
        checkpointing, "checkpoint_layer", lambda *args: seen.append(1) or checkpoint(*args)
    )
    adapter = mf.LoRA(mf.top_layers(0.5, NAMES), 4)
    meta = mf.recipes.focusft(model, adapter=adapter, **options)
    meta({}, mf.Episode(batch, batch))  # The first call runs more, to check the parts.
    seen.clear()
    meta({}, mf.Episode(batch, batch))[0].backward()
    monkeypatch.undo()
    return grads(model), len(seen)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        # Two layers below the cut and two above it; these also in each of two inner steps.
        ({"inner_checkpointing": True}, 8),
        ({"inner_checkpointing": False}, 4),
        ({}, 4),
        ({"estimator": mf.Unrolled()}, 8),
    ],
)
def test_the_gradient_is_the_same(monkeypatch, options, layers):
    batch = chat_batch()
    found, number = step(monkeypatch, batch, **options)
    assert number == layers
    if "estimator" not in options:
        expected, _ = step(monkeypatch, batch, inner_checkpointing=True)
        assert relative(found, expected) < 1e-13


def test_activations_that_do_not_fit_are_recomputed(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "metafocus.checkpointing")
    monkeypatch.setattr(inner_memory, "free_bytes", lambda device: 10**6)
    model, fits = build_exact(checkpointing=True), inner_memory.Fitting()

    def batch(tokens):
        return {"model_inputs": {"input_ids": torch.zeros(1, tokens)}}

    # Hidden 32, MLP 48, float64: 8 * (4 * 48 + 10 * 32 + 6 * 32) bytes a token in each of 4 layers.
    assert inner_memory.kept_per_token(model) == 5632
    assert not fits(model, batch(22)) and fits(model, batch(23))
    assert ["without checkpointing" in text for text in caplog.messages] == [True, False]


def test_memory_of_devices():
    assert inner_memory.free_bytes(torch.device("cpu")) > 0
    assert inner_memory.free_bytes(torch.device("meta")) == 0


def test_other_words_are_refused():
    with pytest.raises(ProblemError, match="inner_checkpointing='never' must be"):
        mf.recipes.focusft(build_exact(), inner_checkpointing="never")(
            {}, mf.Episode(chat_batch(), chat_batch())
        )


class Codes(torch.nn.Parameter):
    """Integer weights that carry their scale, as those of bitsandbytes do."""

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax() / 127
        codes = torch.Tensor._make_subclass(cls, (weight / scale).round().to(torch.int8))
        codes.scale = scale
        return codes


class Quantised(torch.nn.Linear):
    """A linear layer whose forward pass needs its parameter itself, not a copy."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = Codes.of(linear.weight.detach())

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.weight.scale).T


@pytest.mark.parametrize("estimator", [mf.FirstOrder(), mf.Unrolled(recompute=True)])
def test_quantised_weights_are_checkpointed_as_they_are(estimator):
    found = []
    for checkpointing_on in (False, True):
        model = build_exact(checkpointing=checkpointing_on)
        for layer in model.model.layers:
            layer.mlp.up_proj = Quantised(layer.mlp.up_proj)
        meta = mf.recipes.focusft(
            model,
            adapter=mf.LoRA(mf.top_layers(1.0, ("up_proj",)), 4),
            solver=mf.SGD(0.1, 2, clip=mf.clip_per_tensor(1.0)),
            estimator=estimator,
            inner_checkpointing=True,
        )
        batch = chat_batch()
        meta({}, mf.Episode(batch, batch))[0].backward()
        found.append(grads(model))
    # Rounding of float64 in another order.
    assert relative(found[1], found[0]) < 1e-12


def test_bitsandbytes_layers_of_8_bits():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="optional; it runs on a CPU too")
    found = []
    for checkpointing_on in (False, True):
        model = build_exact(checkpointing=checkpointing_on, dtype=torch.float32)
        with torch.no_grad():
            # A feature above the threshold, which these layers multiply apart from the others.
            model.model.embed_tokens.weight[:, 3] *= 400
        for layer in model.model.layers:
            old = layer.mlp.up_proj
            new = bitsandbytes.nn.Linear8bitLt(
                old.in_features, old.out_features, bias=False, has_fp16_weights=False, threshold=6.0
            )
            new.load_state_dict(old.state_dict())
            layer.mlp.up_proj = new.to("cpu")
        meta = mf.recipes.focusft(
            model,
            adapter=mf.LoRA(mf.top_layers(1.0, ("up_proj",)), 4),
            solver=mf.SGD(0.1, 2, clip=mf.clip_per_tensor(1.0)),
            inner_checkpointing=True,
        )
        batch = chat_batch()
        meta({}, mf.Episode(batch, batch))[0].backward()
        found.append(grads(model))
    assert torch.equal(found[0], found[1])
