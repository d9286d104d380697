"""Attention profiles against brute force over eager attention, and what is made of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import transformers as t
from models import NAMES, build, chat_batch, default_attn, families

import metafocus as mf
from metafocus import masks
from metafocus.diagnostics import (
    QUERIES,
    Moment,
    attention_profile,
    plot_comparison,
    plot_engagement,
)
from metafocus.errors import DataError, ProblemError
from metafocus.masks import positions
from metafocus.masks.spans import windowed

# Eager attention takes its softmax in float32, whose roundings pass through all layers.
ROUNDING = 1e-6


def needles(batch):
    """The batch with evidence: three tokens in the first row, none in the second."""
    needle = torch.zeros_like(batch["answer_mask"])
    needle[0, 3:6] = True
    return {**batch, "needle_mask": needle}


def left_padded(batch):
    return {k: v.flip(-1) if k == "attention_mask" else v.roll(4, -1) for k, v in batch.items()}


def packed(length=40):
    """Two documents in a row, and one with padding behind it in the other row."""
    batch = chat_batch(length)
    document = torch.zeros(2, length, dtype=torch.int64)
    document[0, 15:] = 1
    turns = batch["turn_ids"] + 10 * document
    return needles({**batch, "document_ids": document, "turn_ids": turns})


def eager_attentions(model, batch, mask, adapter=None, fast=None):
    """`[layers, B, H, S, S]` in float64 from transformers' eager attention."""
    spans = mask(batch)
    config = model.config
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    dense = spans.dense(model.dtype)
    if window is not None and (not kinds or "sliding_attention" in kinds):
        narrow = windowed(spans, window).dense(model.dtype)
        both = {"full_attention": dense, "sliding_attention": narrow}
        dense = both if kinds else narrow
    adapter = adapter or mf.LoRA(lambda model: ())
    with torch.no_grad(), adapter.bind(model, fast or {}):
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=dense,
            position_ids=positions(batch),
            use_cache=False,
            output_attentions=True,
        )
    return torch.stack(out.attentions).double()


def brute(p, batch, queries, *, heads):
    """Each measure by loops over documents, rows and queries, for each layer, of `[layers]`.

    `p` is `[layers, B, H, S, S]`; with `heads` the results are `[layers, H]`.
    """
    position = positions(batch)
    ids = batch["input_ids"]
    valid = batch.get("attention_mask", torch.ones_like(ids)).bool()
    document = batch.get("document_ids", torch.zeros_like(ids))
    answer = batch["answer_mask"].bool() & valid
    needle = batch.get("needle_mask")
    member = {"answer": answer, "context": valid & ~answer, "all": valid}[queries]
    sums = {}
    tops = []

    def add(name, value):
        total, n = sums.get(name, (0.0, 0))
        sums[name] = total + value, n + 1

    for b in range(len(ids)):
        for d in document[b][valid[b]].unique():
            own = (document[b] == d) & valid[b]
            chosen = (own & member[b]).nonzero().flatten().tolist()
            for i in chosen:
                row = p[:, b, :, i]
                here = torch.arange(len(ids[b])) == i
                first = own & (position[b] == 0)
                if position[b, i] >= 1:
                    add("sink_mass", row[..., first].sum(-1))
                if position[b, i] >= 4:
                    add("sink_mass_4", row[..., own & (position[b] < 4)].sum(-1))
                engaged = own & ~answer[b] & ~first & ~here
                add("context_engagement", row[..., engaged].sum(-1))
                if needle is not None and (needle[b] & own).any():
                    add("needle_mass", row[..., needle[b] & own].sum(-1))
                entropy = torch.special.entr(row).sum(-1)
                add("entropy", entropy)
                add("effective_keys", entropy.exp())
            if chosen:
                column = p[:, b, :, chosen][..., own].mean(2)
                column = column if heads else column.mean(1)
                mass, index = column.max(-1)
                tops.append((len(chosen), mass, index))
    found = {k: total / n for k, (total, n) in sums.items()}
    if not heads:
        found = {k: v.mean(-1) for k, v in found.items()}
    weight = sum(n for n, _, _ in tops)
    found["max_column_mass"] = sum(n * mass for n, mass, _ in tops) / weight
    best = torch.stack([mass for _, mass, _ in tops]).argmax(0, keepdim=True)
    found["max_column_index"] = torch.stack([i for _, _, i in tops]).gather(0, best)[0]
    return found


def check(profile, p, batch):
    for queries in QUERIES:
        for heads, measures in ((False, profile.layers[queries]), (True, profile.heads[queries])):
            expected = brute(p, batch, queries, heads=heads)
            got = dict(measures.items())
            assert set(got) == set(expected)
            for name, value in expected.items():
                # A number of keys is of the order of ten, not of one.
                scale = value.abs().max().clamp(min=1).item()
                error = (got[name] - value).abs().max().item()
                assert got[name].shape == value.shape
                assert error < ROUNDING * scale, (queries, heads, name, error)


@families
@pytest.mark.parametrize("mask", (masks.causal, masks.context_bidirectional))
def test_equals_brute_force(family, mask):
    batch = needles(chat_batch())
    profile = attention_profile(build(family, default_attn(family)), batch, mask=mask)
    check(profile, eager_attentions(build(family, "eager").eval(), batch, mask), batch)


@pytest.mark.parametrize(
    "batch", (left_padded(needles(chat_batch())), packed()), ids=("left", "packed")
)
@pytest.mark.parametrize("family", ("qwen2", "gemma3"))
def test_padding_and_packed_documents(family, batch):
    mask = masks.context_bidirectional
    profile = attention_profile(build(family), batch, mask=mask)
    check(profile, eager_attentions(build(family, "eager").eval(), batch, mask), batch)


@pytest.mark.parametrize("where", ("mlp", "attention"))
def test_with_fast_weights(where):
    """What adapted weights do to attention, in the layers above them and in their own."""
    batch = needles(chat_batch())
    names = NAMES if where == "mlp" else ("q_proj", "k_proj")
    adapter = mf.LoRA(mf.top_layers(0.75, names), rank=2, alpha=4.0)
    model, mask = build("qwen3"), masks.context_bidirectional
    fast = {k: 0.3 * torch.randn_like(v) for k, v in adapter.init(model).items()}
    profile = attention_profile(model, batch, mask=mask, adapter=adapter, fast=fast)
    eager = build("qwen3", "eager").eval()
    check(profile, eager_attentions(eager, batch, mask, adapter, fast), batch)
    plain = attention_profile(model, batch, mask=mask)
    assert (plain.entropy - profile.entropy)[-1].abs() > 1e-6


def test_adapted_fast_weights_of_a_recipe():
    model, batch = build(), chat_batch()
    adapter = mf.LoRA(mf.top_layers(0.5, NAMES), rank=2, alpha=4.0)
    for each in (False, True):
        meta = mf.recipes.focusft(model, adapter=adapter, per_example=each)
        _, aux = meta({}, mf.Episode(batch, batch))
        profile = attention_profile(
            model, batch, mask=masks.context_bidirectional, adapter=adapter, fast=aux.params
        )
        eager = build("qwen2", "eager").eval()
        expected = eager_attentions(eager, batch, masks.context_bidirectional, adapter, aux.params)
        check(profile, expected, batch)


def test_learned_sinks():
    """gpt-oss: the masses leave room for the learned sink, as its eager attention has it."""
    torch.manual_seed(0)
    config = t.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        sliding_window=6, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=131072, attn_implementation="eager",
    )  # fmt: skip
    model = t.GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    batch = needles(chat_batch())
    profile = attention_profile(model, batch, mask=masks.causal)
    check(profile, eager_attentions(model, batch, masks.causal), batch)
    rows = profile.heatmap(1)
    assert (rows.sum(-1) < 0.99).all()


@pytest.mark.parametrize("length", (24, 128, 300))
def test_heatmap_is_the_mean_matrix_in_blocks(length):
    batch = chat_batch(length)
    mask = masks.context_bidirectional
    size = dict(max_position_embeddings=512, layers=2)
    profile = attention_profile(build(**size), batch, mask=mask)
    p = eager_attentions(build(attn="eager", **size).eval(), batch, mask).mean(2)
    block = -(-length // 128)
    assert profile.block == block
    for layer in range(2):
        for row in range(2):
            got = profile.heatmap(layer, row)
            real = int(batch["attention_mask"][row].sum())
            for i in range(0, real, max(block, 17)):
                i -= i % block
                mean = p[layer, row, i : min(i + block, real)].mean(0)
                pieces = torch.stack([x.sum() for x in mean.split(block)])
                assert (got[i // block] - pieces).abs().max() < ROUNDING
            assert got[-(-real // block) :].isnan().all()


def test_many_tiles_change_nothing(monkeypatch):
    """Cut into blocks of few queries and single heads: the numbers are those of one tile."""
    from metafocus.attention.kernels import tiles

    batch, mask = needles(chat_batch(72)), masks.context_bidirectional
    model = build(max_position_embeddings=128)
    whole = attention_profile(model, batch, mask=mask)
    monkeypatch.setattr(tiles, "CAPACITY", 64)
    cut = attention_profile(model, batch, mask=mask)
    for queries in QUERIES:
        pairs = zip(whole.heads[queries].items(), cut.heads[queries].items(), strict=True)
        for (name, a), (_, b) in pairs:
            assert (a - b).abs().max() < 1e-12, name
    assert torch.allclose(whole.cells, cut.cells, atol=1e-7, equal_nan=True)


def test_a_moved_sink_is_found():
    """All queries look at key 5: the first key has nothing, the guard has it all."""
    model = build("llama", layers=2)
    heads = 4
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
    batch = chat_batch()
    flat = attention_profile(model, batch, mask=masks.full)
    # Without queries and keys all keys get the same.
    n = batch["attention_mask"].sum(-1)
    assert flat.sink_mass[0].item() == pytest.approx(
        float((batch["answer_mask"].sum(-1) / n).sum() / batch["answer_mask"].sum())
    )
    assert flat.effective_keys[0].item() == pytest.approx(
        float((batch["answer_mask"].sum(-1) * n).sum() / batch["answer_mask"].sum()), rel=1e-5
    )

    class Fixed:
        def __call__(self, batch):
            start = torch.full_like(batch["input_ids"], 5)
            return mf.Spans(start, start + 1)

    moved = attention_profile(model, batch, mask=Fixed())
    assert moved.sink_mass.abs().max() == 0 and moved.sink(4).abs().max() == 0
    assert torch.allclose(moved.max_column_mass, torch.ones(2, dtype=torch.float64))
    assert moved.max_column_index.tolist() == [5, 5]
    assert moved.entropy.abs().max() < 1e-12
    assert moved.by_head.max_column_index.shape == (2, heads)


def test_the_model_is_left_as_it_was():
    model = build("gemma2", "eager", attention_dropout=0.5)
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = chat_batch()
    one, two = (attention_profile(model, batch, mask=masks.causal) for _ in range(2))
    assert torch.equal(one.entropy, two.entropy)
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_prepared_batches_and_half_precision():
    """A batch prepared for another mask is prepared anew; bfloat16 is summed in float32."""
    model, batch = build(), chat_batch()
    loss = mf.lm_loss(model, adapter=mf.LoRA(lambda m: ()), mask=masks.causal)
    prepared = attention_profile(model, loss.prepare(batch), mask=masks.full)
    plain = attention_profile(model, batch, mask=masks.full)
    assert torch.equal(prepared.entropy, plain.entropy)
    half = attention_profile(build(dtype=torch.bfloat16), batch, mask=masks.full)
    # Two or three digits of bfloat16, in four layers.
    assert (half.sink_mass - plain.sink_mass).abs().max() < 0.01


def test_no_answers_no_evidence(tmp_path):
    batch = chat_batch()
    batch["answer_mask"] = torch.zeros_like(batch["answer_mask"])
    profile = attention_profile(build(), batch, mask=masks.causal)
    assert profile.needle_mass is None and profile.sink_mass.isnan().all()
    assert profile.max_column_mass.isnan().all() and (profile.max_column_index == -1).all()
    assert torch.equal(profile.sink(1, "context"), profile.sink(1, "all"))
    json.dumps(profile.to_dict(), allow_nan=False)
    assert "nan" in profile.table()
    profile.plot(tmp_path / "nothing.png")
    plot_comparison({"nothing": profile}, tmp_path / "nothing.svg")
    plot_engagement([Moment.of(0, profile)], tmp_path / "nothing.pdf")


def test_refusals():
    model, batch = build(), chat_batch()
    fast = {}
    with pytest.raises(ProblemError, match="fast is given without adapter"):
        attention_profile(model, batch, mask=masks.causal, fast=fast)
    with pytest.raises(ProblemError, match="adapter is given without fast"):
        attention_profile(model, batch, mask=masks.causal, adapter=mf.LoRA(mf.all_linear))
    with pytest.raises(ProblemError, match="answer_mask"):
        attention_profile(model, {"input_ids": batch["input_ids"]}, mask=masks.causal)
    with pytest.raises(DataError, match=r"needle_mask.*one entry per token"):
        bad = {**batch, "needle_mask": torch.zeros(2, 3)}
        attention_profile(model, bad, mask=masks.causal)
    with pytest.raises(ProblemError, match="Linear does not let its attention be replaced"):
        attention_profile(torch.nn.Linear(2, 2), batch, mask=masks.causal)
    profile = attention_profile(model, batch, mask=masks.causal)
    with pytest.raises(ProblemError, match=r"n is one of \(1, 4\)"):
        profile.sink(2)
    with pytest.raises(ProblemError, match="answer, context, all"):
        profile.sink(1, "needle")
    for layer, row in ((4, 0), (0, 2), (-5, 0)):
        with pytest.raises(ProblemError, match="4 layers and 2 rows"):
            profile.heatmap(layer, row)


def test_json_pandas_and_table(tmp_path):
    batch = needles(chat_batch())
    profile = attention_profile(build(), batch, mask=masks.causal)
    profile.to_json(tmp_path / "profile.json")
    read = json.loads((tmp_path / "profile.json").read_text())
    found = read["queries"]["context"]["sink_mass_4"]
    assert torch.allclose(torch.tensor(found["layers"]).double(), profile.sink(4, "context"))
    assert torch.tensor(found["heads"]).shape == (4, 4)
    assert (read["tokens"], read["rows"]) == (24, 2)
    frame = profile.to_pandas()
    assert len(frame) == 3 * 4 * 4
    mean = frame[frame.queries == "answer"].groupby("layer").needle_mass.mean()
    assert torch.allclose(torch.tensor(mean.to_numpy()), profile.needle_mass)
    lines = profile.table().splitlines()
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1
    assert f"{profile.sink_mass.mean():.4f}" in lines[-1]


def drawn(path):
    """Whether a file is a picture of its suffix that is not blank."""
    data = path.read_bytes()
    if path.suffix == ".svg":
        return b"<svg" in data and len(data) > 5000
    return data[:4] == (b"\x89PNG" if path.suffix == ".png" else b"%PDF") and len(data) > 5000


@pytest.mark.parametrize("suffix", (".png", ".svg", ".pdf"))
def test_plots(tmp_path, suffix):
    batch = needles(chat_batch())
    model = build()
    causal, turns = (
        attention_profile(model, batch, mask=m) for m in (masks.causal, masks.context_bidirectional)
    )
    paths = [tmp_path / f"{name}{suffix}" for name in ("one", "two", "four", "history")]
    causal.plot(paths[0], layer=-1, row=1)
    plot_comparison({"causal": causal, "by turns": turns}, paths[1])
    plot_comparison({name: turns for name in "abcd"}, paths[2], layer=0)
    plot_engagement([Moment.of(step, causal) for step in (0, 10)], paths[3])
    assert all(drawn(path) for path in paths)
    with pytest.raises(ProblemError, match=r"must end in \.png, \.svg, \.pdf"):
        causal.plot(tmp_path / "figure.bmp")
    with pytest.raises(ProblemError, match="1 to 4 profiles, got 5"):
        plot_comparison({name: turns for name in "abcde"}, paths[0])
    with pytest.raises(ProblemError, match="history is empty"):
        plot_engagement([], paths[0])


def test_moment():
    batch = needles(chat_batch())
    profile = attention_profile(build(), batch, mask=masks.causal)
    moment = Moment.of(7, profile)
    assert moment.step == 7
    assert math.isclose(moment.sink_mass, sum(moment.sink_by_layer) / 4)
    assert math.isclose(moment.needle_mass, profile.needle_mass.mean())


LONG = """
import json, sys, time
import torch
import metafocus as mf
from metafocus.comparison.memory import process_memory
from transformers import Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)
model = Qwen2ForCausalLM(Qwen2Config(
    vocab_size=32000, hidden_size=256, intermediate_size=512, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096))
ids = torch.randint(0, 32000, (1, 4096))
answers = torch.zeros(1, 4096, dtype=torch.bool)
answers[:, 3900:] = True
batch = {"input_ids": ids, "answer_mask": answers, "turn_ids": answers.long()}
before = process_memory("VmRSS")
start = time.perf_counter()
mf.diagnostics.attention_profile(model, batch, mask=getattr(mf.masks, sys.argv[1]))
print(json.dumps({
    "peak": process_memory("VmHWM"), "grown": process_memory("VmHWM") - before,
    "seconds": time.perf_counter() - start}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_memory_of_4096_tokens():
    """The whole process stays below 1 GiB; one [S, S] per head and layer would take 4 GiB."""
    result = subprocess.run(
        [sys.executable, "-c", LONG, "context_bidirectional"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["peak"] < 2**30, found
    assert found["grown"] < 300 * 2**20, found
