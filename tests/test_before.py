"""This library beside an earlier state of itself: equal gradients first, then ratios."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import before
from benchmarks.rivals.harness import ROOT

CASE = {"products": 2}


@pytest.fixture
def states():
    found = {"before": before.State(ROOT, 1), "now": before.State(ROOT, 1)}
    yield found
    for state in found.values():
        state.worker.close()


def test_ratios_and_gradients_of_two_states(states, tmp_path, monkeypatch):
    found = before.rows(states, "w4", CASE, 2, tmp_path)
    (row,) = found.values()
    assert math.isfinite(row["ratio"]) and row["ratio"] > 0 and row["now"] > 0
    # The same two states, one of which answers another gradient.
    right = states["now"].gradient
    monkeypatch.setattr(states["now"], "gradient", lambda *at: right(*at) + 1)
    with pytest.raises(AssertionError, match="metafocus"):
        before.rows(states, "w4", CASE, 2, tmp_path)


def test_the_page_marks_what_is_slower_beyond_noise():
    row = {"before": 0.01, "now": 0.012, "ratio": 1.2, "quartiles": [1.1, 1.3]}
    quicker = {"before": 0.01, "now": 0.0098, "ratio": 0.98, "quartiles": [0.9, 1.0]}
    unsure = {"before": 0.01, "now": 0.0105, "ratio": 1.05, "quartiles": [0.9, 1.2]}
    runs = [{"workload": "w1", "case": {"steps": 5}, "rows": {"a": row, "b": quicker, "c": unsure}}]
    report = {"date": "2026-11-28", "commit": "abc", "day": "2026-12-01", "runs": runs}
    text = "\n".join(before.section(report))
    assert "| W1 | steps 5 | a | 10 | 12 | **1.20** | 1.10-1.30 |" in text
    assert "| b | 10 | 9.8 | 0.98 |" in text and "| c | 10 | 10.5 | 1.05 |" in text


def test_a_state_runs_the_code_of_its_own_checkout(tmp_path):
    package = tmp_path / "benchmarks" / "rivals" / "contenders"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    worker = (ROOT / "benchmarks/rivals/worker.py").read_text()
    (package.parent / "worker.py").write_text(worker)
    (package.parent / "common.py").write_text((ROOT / "benchmarks/rivals/common.py").read_text())
    (package / "metafocus.py").write_text("def w4(data, case):\n    return {'mine': data['f']}\n")
    torch.save({}, tmp_path / "data.pt")
    state = before.State(tmp_path, 1)
    try:
        with pytest.raises(Exception, match="KeyError: 'f'"):
            state.load("w4", CASE, str(tmp_path / "data.pt"), "float64")
    finally:
        state.worker.close()
