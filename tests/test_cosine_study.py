"""The study of first-order hypergradients: its referee works, and its page says what was found."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from example_modules import example_modules

from metafocus import models
from metafocus.data import stdlib_qa

NAMES = ("points", "report", "run")


@pytest.fixture
def study():
    with example_modules("cosine_study", NAMES) as found:
        yield found


def test_the_referee_confirms_the_exact_one_and_weights_come_back(study):
    """In float32 on a tiny random model: slopes of about 10, losses with an error of about 1e-6.

    The central difference moves the weights by 5e-4, so its own error is about 1e-6 / 5e-4 = 2e-3,
    and 1 % of the norm is five times that.
    """
    torch.manual_seed(0)
    model, tokenizer = models.small(stdlib_qa.texts(), num_hidden_layers=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = study.points.chat(tokenizer, 300, 0)
    assert batch["input_ids"].shape[1] <= 300 and batch["answer_mask"].any()
    found = study.points.measure(model, batch, study.points.Point(1.0))
    assert study.report.referee(found) < 0.01
    # The referee can tell the two apart: first order is not this close.
    assert study.report.refuted(found) > 0.1 and abs(found["cosine"]) < 0.95
    assert len(found["losses"]) == 3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    json.dumps(found)


def test_points_have_names_of_their_own(study):
    points = study.points.grid()
    assert len({point.name for point in points}) == len(points) == len(set(points))
    assert {point.rate for point in points} == {0.01, 0.03, 0.1, 0.3, 1.0}


def made_up(study, rate: float, cosine: float, last: float, sample: int = 0):
    slope = {"exact": 2.0, "first-order": 2.0 * cosine, "measured": 2.02}
    return {
        "point": asdict(study.points.Point(rate, sample=sample)),
        "tokens": 200,
        "cosine": cosine,
        "norm": {"first-order": 1.0, "exact": 2.0},
        "losses": [2.0, 1.0, last],
        "slope": None if sample else {"along exact": slope, "along first-order": slope},
    }


def write(study, folder: Path, found) -> str:
    for one in found:
        name = study.points.Point(**one["point"]).name
        (folder / f"{name}.json").write_text(json.dumps(one))
    return study.report.write_report(folder, folder / "report.md")


def test_the_page_says_what_was_found(study, tmp_path):
    found = [
        made_up(study, 0.01, 0.99, 0.5),
        made_up(study, 0.1, 0.97, 0.5),
        made_up(study, 0.1, 0.96, 1.5, sample=1),  # a false alarm
        made_up(study, 1.0, -0.2, 3.0),
        made_up(study, 1.0, 0.2, 0.9, sample=1),  # missed
    ]
    head = write(study, tmp_path, found)
    assert "Central differences, at 3 of them, agree with the exact one to 1.0 %" in head
    assert "At inner rates up to 0.1 it has the right direction at every point that" in head
    assert "From a rate of 1 on it fails at some points." in head
    assert "-0.20 to 0.20" in head
    assert "it says the right thing at 3 of 5 points" in head
    assert "| 1 | 2 | 0 (-0.2 to 0.2) | 2 (2 to 2) | 0 of 2 | 1 of 2 |" in head
    page = (tmp_path / "report.md").read_text()
    assert page.startswith(head)
    assert "| last step lowered the loss | 2 | 1 |" in page
    assert "| last step raised the loss | 1 | 1 |" in page
    assert "Not run so far: bidirectional-K2-rate0.3-240tokens-sample0" in page
    assert (tmp_path / "figures" / "cosine" / "cosine.svg").exists()


def test_the_page_can_say_the_opposite(study, tmp_path):
    """First order may as well be right everywhere, or nowhere."""
    right = write(study, tmp_path, [made_up(study, rate, 0.99, 0.5) for rate in (0.1, 1.0)])
    assert "rates up to 1 it has the right direction" in right
    assert "fails at some points" not in right and "had no failure to find" in right
    (tmp_path / "no").mkdir()
    wrong = write(study, tmp_path / "no", [made_up(study, rate, 0.1, 2.0) for rate in (0.1, 1.0)])
    assert "right direction at every point" not in wrong
    assert "From a rate of 0.1 on it fails" in wrong and "no failure to find" not in wrong
    (tmp_path / "part").mkdir()
    part = write(study, tmp_path / "part", [made_up(study, 0.1, 0.99, 0.5)])
    assert "The paper's rate of 1 has not been measured yet." in part


def test_a_run_goes_on_where_it_stopped(study, tmp_path, monkeypatch, capsys):
    measured = []

    def measure(model, batch, point):
        measured.append(point.rate)
        return made_up(study, point.rate, 0.9, 0.5)

    monkeypatch.setattr(study.run, "measure", measure)
    for words in (("--limit", "1"), (), ()):
        study.run.main(["--quick", "--output", str(tmp_path), *words])
    assert measured == [0.1, 1.0]
    assert "[2/2] bidirectional-K2-rate1-300tokens-sample0: cosine 0.900" in capsys.readouterr().out
