"""The ablation: its tasks and measurements are right, and its report says what the numbers say."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from example_modules import EXAMPLES, example_modules

import metafocus as mf
from metafocus.cells import name_of
from metafocus.data import Collator
from metafocus.errors import NonFiniteError
from metafocus.evals import babilong
from metafocus.evals.prose import Prose

NAMES = (
    *("protocol", "tasks", "loop", "model", "cells"),
    *("effects", "claims", "figures", "tables", "report", "run"),
)
NOISE = Prose(
    tuple(f"The quiet stream number {i} has very little to say about that." for i in range(50))
)


@pytest.fixture
def ablation(monkeypatch):
    with example_modules("ablation", NAMES) as found:
        monkeypatch.setattr(found.tasks, "prose", lambda split: NOISE)
        yield found


@pytest.fixture(scope="module")
def tokenizer():
    from metafocus.data.tokenizer import train_tokenizer

    return train_tokenizer([*NOISE.sentences, "Where is Mary? The code of line is."], 400)


@pytest.fixture
def model(tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
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


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3", "niah"])
def test_answers_follow_from_their_evidence(ablation, task):
    for i in range(30):
        first, *rest = ablation.tasks.chat(task, random.Random(i), NOISE, 5, turns=3)
        text, question = first["content"].rsplit("\n", 1)
        told = " ".join(first["content"][a:b] for a, b in first["evidence"])
        asked = [question] + [m["content"] for m in rest if m["role"] == "user"]
        answers = [m["content"] for m in rest if m["role"] == "assistant"]
        assert len(asked) == len(answers) == len(set(asked))
        for number, (q, a) in enumerate(zip(asked, answers, strict=True)):
            if task == "niah":
                key = q.removeprefix("What is the code of ").rstrip("?")
                assert a in told and a.startswith(f"The code of {key} is ")
                continue
            assert a == ablation.tasks.sentence(q, babilong.solve(task, text, q))
            # The evidence of qa2 and qa3 is that of the first question.
            if task == "qa1" or (task == "qa2" and number == 0):
                assert a == ablation.tasks.sentence(q, babilong.solve(task, told, q))
        assert sum(sentence in text for sentence in NOISE.sentences) == 5


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3", "niah", "stdlib"])
def test_a_sample_fits_its_length_and_is_the_same_again(ablation, tokenizer, task):
    size = 700  # a story of qa2 in the tokens of a tiny vocabulary
    for i in range(3):
        one, two = (
            ablation.tasks.sample(task, f"x {i}", "heldout", size, tokenizer) for _ in range(2)
        )
        assert 0.6 * size < len(one["input_ids"]) <= size
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert one["needle_mask"].any() and not (one["needle_mask"] & one["answer_mask"]).any()
    with pytest.raises(ValueError, match="length=5 does not hold the facts"):
        ablation.tasks.sample(task, "x", "heldout", 5, tokenizer)


# --- measurements --------------------------------------------------------------------------------


def test_right_is_what_greedy_decoding_gives(ablation, tokenizer, model):
    """The one pass over a chat of several turns against transformers' generate, turn by turn."""
    sample = ablation.tasks.sample("niah", "2", "heldout", 400, tokenizer, turns=2)
    turns = sample["turn_ids"][sample["answer_mask"]].unique().tolist()
    assert len(turns) == 2
    # Make the model's own words the reference of the last answer.
    answer = (sample["answer_mask"] & (sample["turn_ids"] == turns[1])).nonzero().flatten()
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
    batch = Collator(tokenizer.pad_token_id)([sample])
    right, losses = ablation.cells.answers(model, ablation.protocol.CAUSAL, batch, {})
    assert right == [False, True]
    each = mf.lm_loss(model, adapter=mf.NoAdapter(), mask=mf.masks.causal)
    for turn, loss in zip(turns, losses, strict=True):
        alone = {**batch, "answer_mask": batch["answer_mask"] & (batch["turn_ids"] == turn)}
        with torch.no_grad():
            assert loss == pytest.approx(float(each({}, {}, alone)), rel=1e-5)


def small_bench(ablation, tokenizer, **sizes):
    scale = dataclasses.replace(
        ablation.protocol.QUICK,
        **{"length": 400, "chats": {400: 1}, "trained": ("qa1", "niah"), "held_out": (), **sizes},
    )
    return scale, ablation.cells.Bench(scale, tokenizer, "cpu")


def test_the_control_uses_another_samples_fast_weights(ablation, tokenizer, model):
    cells, cell = ablation.cells, ablation.protocol.FOCUSFT
    scale, bench = small_bench(ablation, tokenizer, profiled=3)
    found = cells.control(model, cell, bench, scale, 0)
    want = {"own": [], "another's": []}
    for task in scale.trained:
        batches = bench.shown[task]
        fast = [cells.adapted(model, cell, batch, 0) for batch in batches]
        for name, order in (("own", [0, 1, 2]), ("another's", [2, 0, 1])):
            for batch, i in zip(batches, order, strict=True):
                want[name] += cells.answers(model, cell, batch, fast[i])[1]
    assert found["own"] == pytest.approx(want["own"], rel=1e-6)
    assert found["another's"] == pytest.approx(want["another's"], rel=1e-6)
    # Own fast weights have seen the labels.
    assert np.mean(found["own"]) < np.mean(found["none"])


def test_a_cell_can_adapt_to_another_sample(ablation, tokenizer, model, monkeypatch):
    """Support and query are then different chats of one task; else they are the same object."""
    scale, _ = small_bench(ablation, tokenizer, steps=4)
    seen = []
    monkeypatch.setattr(
        ablation.cells,
        "fine_tune",
        lambda model, meta, episodes, **_: (
            seen.append(episodes) or ablation.loop.History([], [], [])
        ),
    )
    for support in ("own", "another"):
        cell = ablation.protocol.Cell("bidirectional", 2, support=support)
        ablation.cells.train(model, tokenizer, scale, cell, 0, lambda line: None)
    own, another = seen
    assert all(e.support is e.query for e in own)
    for i, (episode, mine) in enumerate(zip(another, own, strict=True)):
        assert torch.equal(episode.query["input_ids"], mine.query["input_ids"])
        assert torch.equal(episode.support["input_ids"], own[i - 2].query["input_ids"])
        assert not torch.equal(episode.support["input_ids"], episode.query["input_ids"])


def test_each_step_sees_the_weights_of_the_one_before(ablation, tokenizer, model):
    """Autocast keeps copies of the weights: left open over steps, all see the first weights."""
    cells, protocol = ablation.cells, ablation.protocol
    sample = ablation.tasks.sample("niah", "0", "heldout", 300, tokenizer)
    batch = Collator(tokenizer.pad_token_id)([sample])
    meta = mf.recipes.focusft(model, adapter=protocol.CAUSAL.adapter, mask=mf.masks.causal)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def losses(**options):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
        episodes = [mf.Episode(batch, batch)] * 6
        return ablation.loop.fine_tune(model, meta, episodes, lr=1e-2, **options).loss

    want = losses()
    found = losses(computing=lambda: cells.computing(model.device))
    with cells.computing(model.device):
        stale = losses()
    away = [max(abs(a - b) for a, b in zip(x, want, strict=True)) for x in (found, stale)]
    # Rounding to bfloat16 makes a difference too: measured 0.06, against 2.75.
    assert 10 * away[0] < away[1], away


def test_a_loss_that_is_not_finite_ends_a_cell(ablation, model):
    def meta(outer, episode):
        loss = sum(p.sum() for p in model.parameters()) * float("nan")
        return loss, mf.Aux({}, torch.zeros(0))

    with pytest.raises(NonFiniteError, match="step 0"):
        ablation.loop.fine_tune(model, meta, [mf.Episode({}, {})], lr=1e-3)


def test_cells_differ_in_what_they_say(ablation, model):
    protocol = ablation.protocol
    assert [c.name for c in protocol.MAIN[:2]] == ["causal-none", "bidirectional-none"]
    assert protocol.CAUSAL.adapter.init(model) == {}
    assert len(protocol.FOCUSFT.adapter.init(model)) == 2 * 3 * 2  # 2 layers, 3 matrices, A and B
    controls = [c for control in protocol.CONTROLS.values() for c in control]
    for cell in controls:
        mine, whole = asdict(cell), asdict(protocol.FOCUSFT)
        assert sum(mine[key] != whole[key] for key in mine) == 1
    for scale in protocol.SCALES.values():
        cells = scale.cells()
        assert len(cells) == len({(c.name, s) for c, s in cells})
        # One seed of all four cells before the next.
        assert [s for _, s in cells[: 4 * scale.seeds]] == [
            s for s in range(scale.seeds) for _ in protocol.MAIN
        ]


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
    # Seeds that agree and chats that do not: the uncertainty is that of the chats.
    by_chat = np.broadcast_to(values.T, (5, 400))
    assert interval(by_chat).high - found.mean == pytest.approx(half, rel=0.06)


@pytest.mark.parametrize(
    ("low", "high", "seeds", "above", "verdict"),
    [
        (2.1, 2.2, 5, True, "supported"),
        (2.1, 2.2, 5, False, "contradicted"),
        (0.1, 1.9, 5, True, "contradicted"),
        (0.1, 1.9, 5, False, "supported"),
        (1.9, 2.1, 5, True, "undecided"),
        (2.0, 2.0, 5, True, "undecided"),
        (2.1, 2.2, 2, True, "undecided"),
        (float("nan"), float("nan"), 5, True, "undecided"),
    ],
)
def test_verdicts(ablation, low, high, seeds, above, verdict):
    found = ablation.effects.Effect((low + high) / 2, low, high, seeds)
    assert ablation.claims.Claim("", found, beyond=2.0, above=above).verdict == verdict
    assert ablation.claims.Claim("", None).verdict == "not run"


def made_up(ablation, scale, gain: float, seeds: int = 3):
    """Results in which FocuSFT changes accuracy and loss by `gain`; all else is noise."""
    rng = np.random.default_rng(0)
    protocol = ablation.protocol

    def run(cell, more: float, seed: int):
        # Cells of one seed answer alike, so without a gain their differences are 0.
        paired = np.random.default_rng(seed)
        scores = {
            task: {
                str(n): {
                    "right": (paired.random((10, 3)) < 0.5 + more).tolist(),
                    "loss": (1.0 - more + 0.01 * paired.normal(size=(10, 3))).tolist(),
                }
                for n in scale.chats
            }
            for task in scale.tasks
        }
        # The untrained model has a sink under the causal mask and none under the other.
        masses = {"deployed": 0.3, "training mask": 0.001, "with fast weights": 0.001}
        look = {
            way: {
                "sink_mass": (sink * np.exp(0.01 * rng.normal(size=5))).tolist(),
                "context_engagement": (0.3 + 0.01 * rng.normal(size=5)).tolist(),
                "needle_mass": (0.1 + 0.01 * rng.normal(size=5)).tolist(),
                "max_column_mass": (0.3 + 0.01 * rng.normal(size=5)).tolist(),
                "sink_by_layer": [sink] * 4,
            }
            for way, sink in masses.items()
        }
        control = {"none": [1.0] * 4, "own": [0.5] * 4, "another's": [0.9] * 4}
        return {
            "cell": asdict(cell),
            "scores": {"deployed": scores, "training mask": scores},
            "attention": look,
            "control": control if cell.steps else None,
            "training": {"loss": [2.0, 1.0], "inner": [[2.0, 1.5]] * 2 if cell.steps else [[]] * 2},
        }

    results = {
        cell.name: {
            seed: {**run(cell, gain if cell == protocol.FOCUSFT else 0.0, seed), "seed": seed}
            for seed in range(seeds)
        }
        for cell in protocol.MAIN
    }
    return results, run(protocol.FOCUSFT, 0.0, 0)


def stored(folder: Path, results, base, key: str | None = "result") -> Path:
    """Write runs as a sweep does, or alone."""
    (folder / "results").mkdir(parents=True)
    runs = [base | {"cell": None}, *(run for seeds in results.values() for run in seeds.values())]
    for i, run in enumerate(runs):
        text = json.dumps({key: run} if key else run)
        (folder / "results" / f"{i}.json").write_text(text)
    (folder / "environment.json").write_text(json.dumps({"weights": "a" * 64}))
    return folder


def test_failed_parts_are_no_runs_and_files_of_before_are_read(ablation, tmp_path):
    results, base = made_up(ablation, ablation.protocol.SMOLLM2, 0.4)
    new, old = (stored(tmp_path / str(key), results, base, key=key) for key in ("result", None))
    (new / "results" / "failed.json").write_text(json.dumps({"result": None, "error": "memory"}))
    assert ablation.report.read(new) == ablation.report.read(old)
    assert ablation.report.read(new)[1] == results
    with pytest.raises(SystemExit, match="has no untrained model"):
        ablation.report.read(tmp_path)


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.4, "supported"), (-0.4, "contradicted"), (0.0, "undecided")]
)
def test_the_report_says_what_the_numbers_say(ablation, tmp_path, gain, verdict):
    """Above all it can say that FocuSFT does not help."""
    scale = ablation.protocol.SMOLLM2
    results, base = made_up(ablation, scale, gain)
    found = ablation.claims.claims(scale, results, base)
    whole = [c for c in found if c.text.startswith("FocuSFT raises accuracy")]
    assert len(whole) == 4 and {c.verdict for c in whole} == {verdict}
    # What was not changed is not credited.
    (alone,) = [c for c in found if "the mask alone" in c.text]
    assert alone.verdict == "undecided"
    # The mask alone makes the sink fall 300-fold before any training.
    (takes,) = [c for c in found if "takes training" in c.text]
    assert takes.verdict == "contradicted"
    (deployed,) = [c for c in found if c.text.endswith("FocuSFT, as deployed")]
    assert deployed.verdict == "contradicted"

    head = ablation.report.write_report(scale, stored(tmp_path, results, base))
    page = (tmp_path / "report.md").read_text()
    for line in head.splitlines():
        assert line in page
    assert page.startswith(head.splitlines()[0])
    for claim in whole:
        assert f" | {claim.found.difference} | 3 | **{verdict}** |" in head and claim.text in head
    # In 1 of 2 steps of three runs the loss after the last step is above the one before: 2 > 1.5.
    assert "raised its loss in 3 of 6 training steps" in head
    assert "inner rate: 0.1 | not run" in page and "Not run so far" in page
    assert (tmp_path / "figures" / "report" / "length.svg").exists()


def test_few_seeds_decide_nothing_and_missing_cells_are_said(ablation, tmp_path):
    scale = ablation.protocol.SMOLLM2
    results, base = made_up(ablation, scale, 0.4, seeds=2)
    found = ablation.claims.claims(scale, results, base)
    assert {c.verdict for c in found if c.fewest > 1} == {"undecided"}

    del results[ablation.protocol.FOCUSFT.name]
    results["causal-none"][1] = {**results["causal-none"][1], "diverged": "step 3: loss nan"}
    for key in ("scores", "attention", "training"):
        del results["causal-none"][1][key]
    head = ablation.report.write_report(scale, stored(tmp_path, results, base))
    assert (
        "| FocuSFT raises accuracy: trained tasks, trained length | - | - | 0 | **not run** |"
        in head
    )
    assert "Finished seeds: 1 (causal, plain), 2 (bidirectional, plain), 2 (causal, inner" in head
    page = (tmp_path / "report.md").read_text()
    assert "Diverged in training: causal-none (seed 1): step 3: loss nan." in page

    # The very beginning: nothing but the untrained model.
    empty = ablation.report.write_report(scale, stored(tmp_path / "new", {}, base))
    assert "1 contradicted" in empty and "14 not run" in empty


# --- the whole -----------------------------------------------------------------------------------


def run(output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "ablation" / "run.py"), "--output", str(output), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_the_quick_form_runs_and_goes_on_where_it_stopped(ablation, tmp_path):
    first = run(tmp_path, "--quick")
    assert first.returncode == 0, first.stderr
    assert "| statement | published |" in first.stdout
    parts = sorted((tmp_path / "results").glob("*.json"))
    assert len(parts) == 1 + 4  # the untrained model, four cells
    # A cell that died left nothing; the rest stays as it is, and what comes back is the same.
    cell = asdict(ablation.protocol.BIDIRECTIONAL)
    lost = tmp_path / "results" / f"{name_of({'cell': cell, 'seed': 0})}.json"
    before = json.loads(lost.read_text())
    times = {p: p.stat().st_mtime_ns for p in parts}
    lost.unlink()
    again = run(tmp_path, "--quick")
    assert again.returncode == 0, again.stderr
    assert {p for p in parts if p.stat().st_mtime_ns != times[p]} == {lost}
    after = json.loads(lost.read_text())
    for record in (before, after):
        found = record["result"]
        del record["seconds"], found["measuring_cpu_seconds"], found["training"]["cpu_seconds"]
    assert after == before
    other = run(tmp_path, "--scale", "smollm2")
    assert other.returncode == 1 and "holds a run of other settings" in other.stderr
