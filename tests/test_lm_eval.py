"""lm-evaluation-harness on our checkpoints: its scores of our tasks are ours, answer by answer."""

from __future__ import annotations

import itertools
import json
import random
import sys

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError
from metafocus.evals import babilong, builtin_prose, harness, ruler
from metafocus.evals.results import cells, score
from metafocus.evals.run import answers, prompt_counter, prompt_text
from metafocus.evals.scorers import lm_eval_substring, string_match_all

pytest.importorskip("lm_eval", reason="needs metafocus[eval]")
pytestmark = [
    pytest.mark.xdist_group("lm_eval"),
    # Theirs, of packages that they import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:(datasets|evaluate|sacrebleu|nltk|dill)"
    ),
]

ROOMS = babilong.World().rooms


def chain(tokenizer, first, words):
    """Which token follows which: from the last of `first` through `words` to the end."""
    ids = tokenizer.encode(words, add_special_tokens=False)
    row = [tokenizer.encode(first, add_special_tokens=False)[-1], *ids, tokenizer.eos_token_id]
    return dict(itertools.pairwise(row)) if len(set(row)) == len(row) else None


def parrot(tokenizer, follows):
    """A model that says which token follows which: a table, in the form of a Qwen2.

    Its layers add nothing, so the logits are a function of the last token alone.
    """
    size = 32 * (1 + len(follows) // 32)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=size,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" not in name:
                value.zero_()
        for i, (a, b) in enumerate(follows.items()):
            model.get_input_embeddings().weight[a, i] = 1.0
            model.lm_head.weight[b, i] = 1.0
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint that answers, questions, their tasks, and the report of the harness."""
    folder = tmp_path_factory.mktemp("lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        texts = [*builtin_prose("train").sentences[:100], *(f"the {r} or {r}." for r in ROOMS)]
        tokenizer = train_tokenizer(texts, 700)
        count = prompt_counter(tokenizer)
        items = [
            *babilong.generate(count, task="qa1", length=0, n=12),
            *babilong.generate(count, task="qa4", length=900, n=6),
            *ruler.generate(count, task="fwe", length=600, n=3),
            *ruler.generate(count, task="vt", length=700, n=2),
        ]
        # Two rooms after the header of an answer, and after "are" one word of a text of fwe.
        follows = chain(tokenizer, "assistant\n", "the kitchen or office.")
        words = (f" {word}" for item in items[18:21] for word in item.references)
        rows = (chain(tokenizer, " are", word) for word in words)
        follows |= next(row for row in rows if row and not row.keys() & follows.keys())
        model = parrot(tokenizer, follows)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        names = harness.export_tasks(items, folder / "tasks")
        report = harness.run_tasks(
            folder / "model",
            names,
            include_path=folder / "tasks",
            output=folder / "out" / "lm_eval.json",
            batch_size=4,
            seed=7,
        )
        yield folder, model, tokenizer, items, names, report


def rows(report, names):
    return [r for name in names for r in sorted(report["samples"][name], key=lambda r: r["doc_id"])]


def test_the_same_prompts_answers_and_scores(made):
    _, model, tokenizer, items, names, report = made
    assert names == [
        "metafocus_babilong_qa1_0k",
        "metafocus_babilong_qa4_900",
        "metafocus_ruler_fwe_600",
        "metafocus_ruler_vt_700",
    ]
    ours = answers(model, tokenizer, items)
    found = rows(report, names)
    assert len(found) == len(items)
    for item, said, row in zip(items, ours, found, strict=True):
        assert row["arguments"][0][0] == prompt_text(item, tokenizer)
        assert row["resps"][0][0] == said
        assert {k: row[k] for k in score(item, said)} == score(item, said)
    for cell, name in zip(cells(items, ours), names, strict=True):
        for part in cell.scores:
            assert report["results"][name][f"{part.scorer},none"] == pytest.approx(part.mean)
            assert report["n-samples"][name]["effective"] == part.n
    # The comparison means something: the scores are neither all 0 nor all 1, nor alike.
    first = report["results"]["metafocus_babilong_qa1_0k"]
    assert first["babilong_official,none"] == 0 < first["lm_eval_substring,none"] < 1
    targets = [item.references[0] for item in items[:12]]
    share = sum(target in ("kitchen", "office") for target in targets) / 12
    assert first["lm_eval_substring,none"] == pytest.approx(share)
    assert 0 < report["results"]["metafocus_ruler_fwe_600"]["string_match_all,none"] < 1


def test_the_report_says_what_it_depends_on(made):
    folder, _, _, _, names, report = made
    saved = json.loads((folder / "out" / "lm_eval.json").read_text())
    assert saved["results"] == json.loads(json.dumps(report["results"]))
    assert saved["versions"] == dict.fromkeys(names, harness.VERSION)
    about = saved["metafocus"]
    assert about["seed"] == 7 and about["tasks"] == names and about["lm_eval"]
    assert about["model_args"]["pretrained"] == str(folder / "model")
    assert about["environment"]["torch"] == torch.__version__
    assert saved["configs"][names[0]]["generation_kwargs"]["do_sample"] is False
    (row, *_) = saved["samples"][names[0]]
    assert "prompt" not in row["doc"] and row["resps"]


def test_their_scorers_are_ours():
    """The functions that lm-evaluation-harness scores its own babilong and ruler tasks with."""
    from lm_eval.tasks.babilong import common_utils as theirs_babilong
    from lm_eval.tasks.ruler import common_utils as theirs_ruler

    rng = random.Random(0)
    words = [*ROOMS, "Kitchenette", "no", "the", "kit\x00chen", "\n", "HALLWAY", "", " . "]
    right = 0
    for _ in range(200):
        output = " ".join(rng.choices(words, k=rng.randrange(12)))
        target = rng.choice(ROOMS)
        theirs = theirs_babilong.process_results({"target": f" {target}\n"}, [output])["acc"]
        assert lm_eval_substring(output, target) == bool(theirs)
        right += bool(theirs)
        references = rng.sample(ROOMS, 3)
        doc = {"max_length": 4096, "outputs": references}
        all_of = theirs_ruler.process_results(doc, [output])["4096"]
        assert string_match_all([output], [references]) == pytest.approx(100 * all_of)
    assert 40 < right < 160


def test_folders_can_be_moved_and_limited(made, monkeypatch):
    folder, _, _, _, names, report = made
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "tasks").rename(folder / "moved")
    again = harness.run_tasks(
        folder / "model", names[:1], include_path=folder / "moved", limit=5, seed=7
    )
    assert again["n-samples"][names[0]] == {"original": 12, "effective": 5}
    said = [r["resps"] for r in rows(again, names[:1])]
    assert said == [r["resps"] for r in rows(report, names[:1])][:5]


def test_errors(made, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="items is empty"):
        harness.export_tasks([], tmp_path)
    for tasks in ([], "babilong"):
        with pytest.raises(DataError, match="pass a list"):
            harness.run_tasks("m", tasks)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DataError, match=r"pip install 'metafocus\[eval\]'"):
        harness.run_tasks("m", ["t"])
