"""Span attention inside Hugging Face models."""

from __future__ import annotations

import pytest
import torch
from models import build, chat_batch, relative
from torch.func import functional_call, grad, jvp, vmap

from metafocus import masks
from metafocus.attention import register
from metafocus.errors import ProblemError
from metafocus.masks import positions
from metafocus.masks.spans import Spans, windowed

MODELS = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3", "gpt2")
# Softmax and RMSNorm of transformers round to float32: see fine print 16 of the design.
ROUNDING = 3e-6


@pytest.fixture(autouse=True)
def registered():
    register()


def logits(model, batch, mask):
    return model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=positions(batch),
        use_cache=False,
    ).logits


def dense_masks(model, spans):
    """What eager attention needs: an additive mask, narrowed for layers with a window."""
    window = getattr(model.config, "sliding_window", None)
    kinds = set(getattr(model.config, "layer_types", None) or ())
    full = spans.dense(model.dtype)
    if window is None or (kinds and "sliding_attention" not in kinds):
        return full
    narrow = windowed(spans, window).dense(model.dtype)
    return {"full_attention": full, "sliding_attention": narrow} if kinds else narrow


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("length", (24, 72))
def test_equals_eager(family, length):
    batch = chat_batch(length)
    spans = masks.context_bidirectional(batch)
    size = {} if family == "gpt2" else {"max_position_embeddings": 128}
    if family == "gpt2" and length > 64:
        pytest.skip("gpt2 has 64 learned positions here")
    ours = build(family, "metafocus", **size)
    eager = build(family, "eager", **size)
    got = logits(ours, batch, spans.stack())
    expected = logits(eager, batch, dense_masks(eager, spans))
    # A padded query sees nothing; eager attention spreads it over all keys.
    valid = batch["attention_mask"].bool()
    assert relative(got[valid], expected[valid]) < ROUNDING


@pytest.mark.parametrize("backend", ("", "_dense", "_tiled", "_fused", "_flex"))
def test_every_backend_has_a_name(backend):
    batch = chat_batch(24)
    spans = masks.context_bidirectional(batch)
    with torch.no_grad():
        got = logits(build("qwen2", f"metafocus{backend}"), batch, spans.stack())
        expected = logits(build("qwen2", "sdpa"), batch, spans.dense())
    valid = batch["attention_mask"].bool()
    assert relative(got[valid], expected[valid]) < ROUNDING


@pytest.mark.parametrize("family", ("qwen2", "gemma3"))
def test_transforms(family):
    """grad, grad of grad, jvp of grad and vmap of them equal those through eager attention."""
    batch = chat_batch(72)
    spans = masks.context_bidirectional(batch)
    valid = batch["attention_mask"].bool()
    models = {
        a: build(family, a, max_position_embeddings=128) for a in ("metafocus_tiled", "eager")
    }
    names = [n for n, _ in models["eager"].named_parameters() if "layers.0" in n and "proj" in n]
    start = {n: p.detach() for n, p in models["eager"].named_parameters() if n in names}
    way = {n: torch.ones_like(p) for n, p in start.items()}

    def loss(attention, params):
        model = models[attention]
        mask = spans.stack() if attention != "eager" else dense_masks(model, spans)
        inputs = dict(attention_mask=mask, position_ids=positions(batch), use_cache=False)
        out = functional_call(model, params, (batch["input_ids"],), inputs).logits
        # A mask of positions, since under vmap the number of selected ones must be known.
        return torch.where(valid.unsqueeze(-1), out, 0.0).square().mean()

    def first(attention):
        return lambda p: grad(lambda q: loss(attention, q))(p)

    def second(attention):
        return lambda p: grad(lambda q: sum((g * g).sum() for g in first(attention)(q).values()))(p)

    def ahead(attention):
        return lambda p: jvp(first(attention), (p,), (way,))[1]

    many = {n: torch.stack((p, 1.1 * p)) for n, p in start.items()}
    for kind in (first, second, ahead):
        got, expected = kind("metafocus_tiled")(start), kind("eager")(start)
        for name in names:
            assert relative(got[name], expected[name]) < 1e-5, (kind.__name__, name)
        mapped = vmap(kind("metafocus_tiled"))(many)
        for name in names:
            assert relative(mapped[name][0], got[name]) < 1e-10, (kind.__name__, name)


def test_compiled_first_order():
    batch = chat_batch(72)
    spans = masks.context_bidirectional(batch)
    model = build("qwen2", "metafocus", max_position_embeddings=128, layers=2)
    parameters = list(model.parameters())

    def loss(mask):
        return logits(model, batch, mask).square().mean()

    expected = torch.autograd.grad(loss(spans.stack()), parameters)
    torch._dynamo.reset()
    got = torch.autograd.grad(
        torch.compile(loss, backend="aot_eager", fullgraph=True)(spans.stack()), parameters
    )
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 1e-12


def test_a_plain_call_works_as_with_sdpa():
    """Without spans: no mask, a padding mask, and generation with a cache."""
    batch = chat_batch(24)
    ours, sdpa = build("qwen2", "metafocus").eval(), build("qwen2", "sdpa").eval()
    ids, padding = batch["input_ids"], batch["attention_mask"]
    valid = padding.bool()
    with torch.no_grad():
        for mask in (None, padding):
            got = ours(input_ids=ids, attention_mask=mask).logits
            expected = sdpa(input_ids=ids, attention_mask=mask).logits
            assert relative(got[valid], expected[valid]) < ROUNDING
        options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert torch.equal(ours.generate(ids, **options), sdpa.generate(ids, **options))


def test_registering_twice_changes_nothing():
    register()
    register()
    assert build("qwen2", "metafocus").config._attn_implementation == "metafocus"


def test_refusals():
    batch = chat_batch(24)
    spans = masks.causal(batch)
    layer = build("qwen2", "metafocus").model.layers[0].self_attn
    hidden = torch.randn(2, 24, 32, dtype=torch.float64)
    rotary = tuple(torch.zeros(2, 24, 8, dtype=torch.float64) for _ in range(2))
    with pytest.raises(ProblemError, match=r"Qwen2Attention got attention_mask=None"):
        layer(hidden, position_embeddings=rotary, attention_mask=None)
    model = build("qwen2", "metafocus", attention_dropout=0.1)
    with pytest.raises(ProblemError, match=r"dropout \(0.1\).*model.eval\(\)"):
        logits(model, batch, spans.stack())
    logits(model.eval(), batch, spans.stack())
    with pytest.raises(ProblemError, match="stacked spans must be an integer tensor"):
        logits(build("qwen2", "metafocus"), batch, spans.dense(torch.float64))


def test_sinks_of_gpt_oss():
    """A model with sinks: equal to its eager attention."""
    import transformers as t

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    config = t.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        sliding_window=6, layer_types=kinds, max_position_embeddings=131072,
        attn_implementation="metafocus",
    )  # fmt: skip
    # Its grouped products take no float64.
    model = t.GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    batch = chat_batch(72)
    spans = masks.context_bidirectional(batch)
    valid = batch["attention_mask"].bool()
    got = logits(model, batch, spans.stack())
    model.set_attn_implementation("eager")
    expected = logits(model, batch, dense_masks(model, spans))
    assert relative(got[valid], expected[valid]) < ROUNDING


def test_spans_in_a_packed_row():
    """Two documents in one row do not see each other: the logits are those of each alone."""
    model = build("qwen2", "metafocus", max_position_embeddings=128)
    ids = chat_batch(80)["input_ids"][:1]
    document = torch.cat((torch.zeros(1, 30), torch.ones(1, 50)), 1).long()
    packed = {"input_ids": ids, "document_ids": document}
    got = logits(model, packed, masks.causal(packed).stack())
    for part in (slice(0, 30), slice(30, 80)):
        alone = {"input_ids": ids[:, part]}
        expected = logits(model, alone, masks.causal(alone).stack())
        assert relative(got[:, part], expected) < ROUNDING


def test_unstack_is_the_inverse():
    spans = masks.causal(chat_batch(24))
    again = Spans.unstack(spans.stack())
    assert torch.equal(again.start, spans.start) and torch.equal(again.stop, spans.stop)
