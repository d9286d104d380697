"""examples/ablation: what it measures, what it concludes, and that it can be resumed."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import metafocus as mf
from metafocus.data import Collator
from metafocus.evals import babilong
from metafocus.evals.prose import Prose

FOLDER = Path(__file__).parent.parent / "examples" / "ablation"
NAMES = ("scale", "tasks", "induction", "base", "cells", "effects", "claims", "figures", "report")
NOISE = Prose(
    tuple(f"The quiet stream number {i} has very little to say about that." for i in range(50))
)


@pytest.fixture
def ablation(monkeypatch):
    """The modules of the example; their plain names leave with the test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer():
    from metafocus.data.tokenizer import train_tokenizer

    return train_tokenizer([*NOISE.sentences, "Where is Mary? The code of line is."], 400)


@pytest.fixture
def model(tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()


# --- tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["qa1", "qa4", "niah"])
def test_answers_follow_from_their_evidence(ablation, task):
    for i in range(50):
        first, *rest = ablation.tasks.chat(task, random.Random(i), NOISE, 5, turns=3)
        text, question = first["content"].rsplit("\n", 1)
        told = " ".join(first["content"][a:b] for a, b in first["evidence"])
        asked = [question] + [m["content"] for m in rest if m["role"] == "user"]
        answers = [m["content"] for m in rest if m["role"] == "assistant"]
        assert len(asked) == len(answers)
        for q, a in zip(asked, answers, strict=True):
            if task == "niah":
                key = q.removeprefix("What is the code of ").rstrip("?")
                assert a in told and a.startswith(f"The code of {key} is ")
            else:
                assert a == ablation.tasks.sentence(q, babilong.solve(task, told, q))
                # A sentence that answers, in the words of the facts.
                assert task == "qa1" or a in told or babilong.solve(task, a, q) in a
        assert sum(sentence in text for sentence in NOISE.sentences) == 5


@pytest.mark.parametrize("task", ["qa1", "qa4", "niah"])
def test_a_sample_fits_its_length_and_is_the_same_again(ablation, tokenizer, task):
    for i in range(5):
        one, two = (ablation.tasks.sample(task, f"x {i}", NOISE, 400, tokenizer) for _ in range(2))
        assert 300 < len(one["input_ids"]) <= 400
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert one["needle_mask"].any() and not (one["needle_mask"] & one["answer_mask"]).any()
    with pytest.raises(ValueError, match="length=5 does not hold the facts"):
        ablation.tasks.sample(task, "x", NOISE, 5, tokenizer)


# --- the base ------------------------------------------------------------------------------------


def test_two_heads_begin_as_an_induction_circuit(ablation, tmp_path):
    """The second layer attends to what followed the present token before, far above chance."""
    scale = ablation.scale.CPU
    tokenizer, config = ablation.base.prepared(scale, NOISE, tmp_path / "base")
    config._attn_implementation = "eager"
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    ablation.induction.plant_induction(model, tokenizer.bos_token_id, generator)
    words = torch.randperm(len(tokenizer), generator=generator)[:60]
    ids = torch.cat((torch.tensor([tokenizer.bos_token_id]), words, words))[None]
    with torch.no_grad():
        looks = model(input_ids=ids, output_attentions=True).attentions
    new, again = torch.arange(5, 61), torch.arange(62, 120)
    assert looks[0][0, 0, again, again - 1].mean() > 0.5
    found = looks[1][0, :, again, again - 59].mean(-1)
    assert found[0] > 0.15 and found[2] < 0.05  # an equal share: 0.01
    # With nothing to find, it rests.
    first = looks[1][0, 0, :, 0]
    share = (1 / (new + 1)).mean()
    assert first[new].mean() > 2 * share and first[new].mean() > first[again].mean()


def test_rows_begin_with_the_one_first_token(ablation, tmp_path):
    scale = ablation.scale.CPU
    tokenizer, _ = ablation.base.prepared(scale, NOISE, tmp_path / "base")
    rows = ablation.base.Rows(scale, tokenizer, NOISE)
    seen = set()
    for i in range(30):
        row = rows[i]
        ids, kinds = row["input_ids"], row["kinds"]
        assert len(ids) == len(kinds) == scale.pretrain_length
        assert (ids == tokenizer.bos_token_id).nonzero().tolist() == [[0]]
        assert kinds[0] == ablation.base.UNKNOWABLE
        assert all(torch.equal(value, rows[i][key]) for key, value in row.items())
        seen |= set(kinds.tolist())
    assert seen == {0, 1, 2, 3}
    chat = ablation.tasks.sample("qa1", "x", NOISE, 400, tokenizer)["input_ids"]
    assert (chat == tokenizer.bos_token_id).nonzero().tolist() == [[0]]


# --- measurements --------------------------------------------------------------------------------


def test_right_is_what_greedy_decoding_gives(ablation, tokenizer, model):
    """The one pass over prompt and answer against transformers' generate."""
    samples = [ablation.tasks.sample("qa1", str(i), NOISE, 400, tokenizer) for i in range(4)]
    for sample in samples[:2]:
        # Make the model's own words the reference.
        answer = sample["answer_mask"].nonzero().flatten()
        prompt = sample["input_ids"][None, : answer[0]]
        spoken = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(answer),
            min_new_tokens=len(answer),
            do_sample=False,
            eos_token_id=None,
        )
        sample["input_ids"][answer] = spoken[0, answer[0] :]
    batch = Collator(tokenizer.pad_token_id)(samples)
    right, loss = ablation.cells.answers(model, ablation.scale.CAUSAL, batch, {})
    assert right.tolist() == [True, True, False, False]
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    each = mf.lm_loss(model, adapter=ablation.scale.CAUSAL.adapter, mask=mf.masks.causal)
    with torch.no_grad():
        torch.testing.assert_close(loss, torch.stack([each({}, {}, row) for row in rows]))


def test_the_control_uses_another_samples_fast_weights(ablation, tokenizer, model):
    cells, cell = ablation.cells, ablation.scale.FOCUSFT
    samples = [ablation.tasks.sample("niah", str(i), NOISE, 150, tokenizer) for i in range(3)]
    pad = cells.on_device(Collator(tokenizer.pad_token_id), model.device)
    found = cells.control(model, cell, {"niah": samples}, pad, 0)
    batches = [pad([sample]) for sample in samples]
    fast = [cells.adapted(model, cell, batch, 0) for batch in batches]

    def mean(order: list[int]) -> float:
        return np.mean(
            [
                cells.answers(model, cell, batch, fast[i])[1].item()
                for batch, i in zip(batches, order, strict=True)
            ]
        ).item()

    assert found["own"] == pytest.approx(mean([0, 1, 2]), rel=1e-6)
    assert found["another's"] == pytest.approx(mean([2, 0, 1]), rel=1e-6)
    # Own fast weights have seen the labels.
    assert found["own"] < found["none"]


def test_cells_differ_in_what_they_say(ablation, model):
    scale = ablation.scale
    assert [c.name for c in scale.MAIN[:2]] == ["causal-none", "bidirectional-none"]
    assert scale.CAUSAL.adapter.init(model) == {}
    assert len(scale.FOCUSFT.adapter.init(model)) == 2 * 3 * 2  # 2 of 3 layers, 3 matrices, A and B
    sizes = {c: c.adapter for sweep in scale.SWEEPS.values() for c in sweep}
    assert len({c.name for c in sizes}) == len(sizes)
    for chosen in scale.SCALES.values():
        cells = chosen.cells()
        assert len(cells) == len({(c.name, s) for c, s in cells})
        assert cells[:4] == [(c, 0) for c in scale.MAIN]


# --- conclusions ---------------------------------------------------------------------------------


def test_the_interval_of_a_mean(ablation):
    interval = ablation.effects.interval
    still = interval(np.full((5, 10), 0.25))
    assert (still.mean, still.low, still.high) == pytest.approx((0.25, 0.25, 0.25))
    assert still.seeds == 5
    values = np.random.default_rng(1).normal(size=(400, 1))
    found = interval(values)
    # The normal interval of the mean: 1.96 standard errors, to the Monte Carlo error of 4000 draws.
    half = 1.96 * values.std() / 20
    assert found.high - found.mean == pytest.approx(half, rel=0.06)
    # Seeds that agree and questions that do not: the uncertainty is that of the questions.
    by_question = np.broadcast_to(values.T, (5, 400))
    assert interval(by_question).high - found.mean == pytest.approx(half, rel=0.06)


@pytest.mark.parametrize(
    ("low", "high", "seeds", "up", "verdict"),
    [
        (0.1, 0.2, 5, True, "supported"),
        (0.1, 0.2, 5, False, "contradicted"),
        (-0.2, -0.1, 5, True, "contradicted"),
        (-0.2, -0.1, 5, False, "supported"),
        (-0.1, 0.1, 5, True, "undecided"),
        (0.0, 0.0, 5, True, "undecided"),
        (0.1, 0.2, 2, True, "undecided"),
        (float("nan"), float("nan"), 5, True, "undecided"),
    ],
)
def test_verdicts(ablation, low, high, seeds, up, verdict):
    assert ablation.effects.Effect((low + high) / 2, low, high, seeds).verdict(up) == verdict


def made_up(ablation, scale, gain: float, seeds: int = 5, sink: float = 0.5):
    """Results in which FocuSFT changes accuracy and attention by `gain`; others by nothing."""
    rng = np.random.default_rng(0)
    results = {}
    for cell in ablation.scale.MAIN:
        more = gain if cell == ablation.scale.FOCUSFT else 0.0
        for seed in range(seeds):
            right = (rng.random(40) < 0.5 + more).astype(int).tolist()
            scores = {
                task: {
                    str(n): {"right": right, "accuracy": np.mean(right).item(), "loss": 1.0}
                    for n in scale.lengths
                }
                for task in scale.trained + scale.held_out
            }
            look = {
                "sink_mass": sink - more + rng.normal() / 100,
                "context_engagement": 0.3 + more + rng.normal() / 100,
                "needle_mass": 0.1,
                "max_column_mass": sink + rng.normal() / 100,
                "sink_by_layer": [sink] * scale.layers,
            }
            ways = ("deployed", "training mask", "with fast weights")
            results.setdefault(cell.name, {})[seed] = {
                "cell": asdict(cell),
                "seed": seed,
                "scores": {"deployed": scores},
                "attention": {way: look for way in ways},
                "control": {"none": 1.0, "own": 0.9, "another's": 0.9} if cell.inner else None,
                "training": {"loss": [2.0, 1.0], "last_loss": 1.0},
                "seconds": 1.0,
            }
    base = results["causal-none"][0]
    return results, base


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.4, "supported"), (-0.4, "contradicted"), (0.0, "undecided")]
)
def test_the_report_says_what_the_numbers_say(ablation, tmp_path, gain, verdict):
    """Above all it can say that FocuSFT does not help."""
    scale = ablation.scale.CPU
    results, base = made_up(ablation, scale, gain)
    found = ablation.claims.claims(scale, results, base)
    whole = [c for c in found if "FocuSFT against" in c.text and c.about == "accuracy"]
    assert len(whole) == 4 and {c.verdict for c in whole} == {verdict}
    # What was not changed is not credited.
    alone = [c for c in found if "without an inner loop" in c.text and c.about == "accuracy"]
    assert {c.verdict for c in alone} == {"undecided"}

    (tmp_path / "results").mkdir()
    for name, runs in results.items():
        for seed, run in runs.items():
            (tmp_path / "results" / f"{name}-seed{seed}.json").write_text(json.dumps(run))
    (tmp_path / "results" / "base.json").write_text(json.dumps(base))
    at = {"device": "cpu", "cores": 2, "torch": "2"}
    (tmp_path / "environment.json").write_text(json.dumps(at))
    head = ablation.report.write_report(scale, tmp_path)
    title = f"**{verdict.capitalize()} by this run: "
    section = head[head.index(title) :].split("\n**")[0]
    assert all(claim.text in section for claim in whole)
    assert (tmp_path / "report.md").read_text().startswith(head)
    assert (tmp_path / "figures" / "ablation" / "accuracy.svg").exists()


def test_one_seed_or_no_sink_decides_nothing(ablation):
    scale = ablation.scale.CPU
    one = ablation.claims.claims(scale, *made_up(ablation, scale, 0.4, seeds=1))
    assert {claim.verdict for claim in one} == {"undecided"}
    none = ablation.claims.claims(scale, *made_up(ablation, scale, 0.01, sink=0.02))
    sinks = [claim for claim in none if "first token" in claim.text]
    assert {claim.verdict for claim in sinks} == {"undecided"}
    assert all("no first-token sink" in claim.blocked for claim in sinks)


# --- the whole -----------------------------------------------------------------------------------


def run(output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--output", str(output), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_the_quick_form_runs_and_goes_on_where_it_stopped(tmp_path):
    first = run(tmp_path, "--quick")
    assert first.returncode == 0, first.stderr
    assert "claims.**" in first.stdout
    parts = sorted((tmp_path / "results").iterdir())
    assert len(parts) == 2 + 4  # pre-training, the base, four cells
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert len(manifest["finished"]) == 4 and manifest["missing"] == []
    # A cell that died left nothing; the rest stays as it is, and what comes back is the same.
    lost = tmp_path / "results" / "bidirectional-none-seed0.json"
    before = json.loads(lost.read_text())
    times = {p: p.stat().st_mtime_ns for p in parts}
    lost.unlink()
    again = run(tmp_path, "--quick", "--workers", "2")
    assert again.returncode == 0, again.stderr
    assert {p for p in parts if p.stat().st_mtime_ns != times[p]} == {lost}
    after = json.loads(lost.read_text())
    for found in (before, after):
        del found["seconds"], found["training"]["cpu_seconds"]
    assert after == before
    other = run(tmp_path, "--scale", "cpu")
    assert other.returncode == 1 and "holds a run of other settings" in other.stderr
