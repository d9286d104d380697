"""Architectures of transformers: gradients against an oracle, and one sentence for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import CAUSAL, MASKED, batch, build, errors

import metafocus as mf
from metafocus.errors import PlacementError, ProblemError
from metafocus.lm.hf.attention import attending
from metafocus.lm.hf.inputs import model_inputs

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
QUICK = ("llama", "gpt_oss", "phimoe", "mpt", "doge", "qwen3_5", "bloom")
# Their heads are measured in float32, which warns where a head cannot be split off.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in (*MASKED, *CAUSAL)
    ],
)
def test_gradients_equal_the_oracle(name):
    for what, error in errors(name).items():
        # Rotary angles, norms and eager softmax are float32 in transformers.
        assert error is None or error < 3e-6, what
    assert f"| {name} |" in PAGE.read_text("utf-8")


def test_there_are_enough_architectures():
    assert len({*MASKED, *CAUSAL}) >= 60


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MASKED],
)
def test_the_mask_reaches_the_attention(name):
    """The oracle is the same model, so it cannot tell: some models ignore all but a causal mask."""
    model = build(name)
    one = torch.tensor([[5, 9, 14, 23, 31]])
    other = one.clone()
    other[0, -1] = 44
    seen = []
    for ids in (one, other):
        spans, place = mf.masks.full({"input_ids": ids}), mf.masks.positions({"input_ids": ids})
        with torch.no_grad(), attending(model):
            seen.append(model(**model_inputs(model, ids, place, spans)).logits[0, 0])
    # Logits of random models are small, and so is their change; ignoring the mask gives exactly 0.
    assert not torch.allclose(*seen, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["qwen3_5", "rwkv", "bloom", "gpt_neo"])
def test_other_masks_are_refused(name):
    model = build(name)
    loss = mf.lm_loss(model, adapter=mf.NoAdapter(), mask=mf.masks.context_bidirectional)
    with pytest.raises(ProblemError, match=r"takes no explicit mask: .*mask=mf\.masks\.causal"):
        loss({}, {}, batch())
    loss = mf.lm_loss(model, adapter=mf.NoAdapter(), mask=mf.masks.causal)
    with pytest.raises(ProblemError, match="without packed documents"):
        loss({}, {}, batch(packed=True))


def test_falcon_with_alibi_runs_causally():
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    )
    model = FalconForCausalLM(config)
    causal = mf.lm_loss(model, adapter=mf.NoAdapter(), mask=mf.masks.causal)
    assert torch.isfinite(causal({}, {}, batch()))
    with pytest.raises(ProblemError, match="ALiBi"):
        mf.recipes.focusft(model, adapter=mf.LoRA(mf.all_linear, 2))(
            {}, mf.Episode(batch(), batch())
        )


def test_models_that_are_no_causal_language_models():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8)
    with pytest.raises(ProblemError, match="T5ForConditionalGeneration, an encoder with a decoder"):
        mf.lm_loss(T5ForConditionalGeneration(config), adapter=mf.NoAdapter(), mask=mf.masks.causal)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("llama").float(), config)
    with pytest.raises(ProblemError, match=r"PEFT adapter of type P\w+_TUNING.*Use LoRA"):
        mf.lm_loss(model, adapter=mf.NoAdapter(), mask=mf.masks.causal)


@pytest.mark.parametrize(
    ("name", "names"),
    [("phi", "fc1,fc2"), ("phi3", "gate_up_proj,down_proj"), ("gpt2", "c_fc,mlp.c_proj")],
)
def test_the_placement_names_the_option(name, names):
    model = build(name)
    with pytest.raises(PlacementError, match=f"--lora_modules {names}"):
        mf.recipes.focusft(model)({}, mf.Episode(batch(), batch()))
    placed = mf.top_layers(0.5, tuple(names.split(",")))(model)
    assert len(placed) == 2 and all(".1." in path for path in placed)


def test_weights_that_are_read_without_a_call_are_not_adapted():
    model = build("falcon_mamba")
    assert {path.rpartition(".")[2] for path in mf.all_linear(model)} == {"in_proj"}
    lora = mf.LoRA(mf.matching(".*dt_proj"), 2)
    with pytest.raises(PlacementError, match=r"dt_proj', whose weight .* without calling"):
        lora.init(model)
