"""The comparison with rivals: its checker, its reports and its verdicts, on made-up contenders."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.rivals import harness, install, report, worker
from benchmarks.rivals.common import cast, flat
from benchmarks.rivals.targets import Target, verdicts
from benchmarks.rivals.workloads import w1


def row(verdict="right", **values):
    return {"rival": "x", "version": "1", "verdict": verdict, **values}


def timed(*cpu, **values):
    base = {"error": 0.0, "cpu": list(cpu), "seconds": cpu[0], "ratio": cpu[0]}
    return row(**base, ratio_quartiles=[cpu[0], cpu[0]], **values)


RUN = {
    "case": {"steps": 5, "order": 2},
    "threads": 1,
    "repeats": 3,
    "rows": {
        "metafocus vmap": timed(1.0, 2.0, 3.0, process_bytes=30),
        "slow": timed(8.0, 8.0, 12.0, process_bytes=100),
        "fast": timed(2.0, 2.0, 2.0, process_bytes=20),
        "bad": row("wrong", error=0.1, cpu=[0.1, 0.1, 0.1]),
        "gone": row("absent", message="ResolutionImpossible"),
    },
}


def test_a_wrong_rival_is_reported_as_wrong():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = {
        "reference": ("a", exact),
        "good": ("b", exact * (1 + 1e-13)),
        "off": ("c", exact + torch.tensor([0.0, 0.5])),
        "short": ("d", exact[:1]),
        "broken": ("e", exact * float("nan")),
    }
    rows = harness.judged({k: {} for k in found}, found, "reference", 1e-9)
    assert {k: r["verdict"] for k, r in rows.items()} == {
        "reference": "right", "good": "right", "off": "wrong", "short": "wrong", "broken": "wrong",
    }  # fmt: skip
    assert rows["off"]["error"] == pytest.approx(0.1)


def test_a_worker_weighs_a_contender(tmp_path):
    case = w1.cases(quick=True)[0]
    torch.save(w1.data(case), tmp_path / "data.pt")
    one = worker.Worker("by_hand")
    (name, *_) = one.load("w1", case, str(tmp_path / "data.pt"), "float32")["names"]
    found = one.peak(name)
    weights = 4 * (40 + 40 + 40 * 40 + 40 + 40 + 1)
    assert found["tensor_bytes"] > weights and found["process_bytes"] >= 0 and found["flop"] > 0


def test_ours_must_not_be_wrong():
    exact = torch.ones(2, dtype=torch.float64)
    found = {"reference": ("a", exact), "metafocus vmap": ("b", 2 * exact)}
    with pytest.raises(AssertionError, match="metafocus vmap: relative error 1"):
        harness.judged({k: {} for k in found}, found, "reference", 1e-9)


def test_no_reference_no_race():
    with pytest.raises(AssertionError, match="no gradient of the reference"):
        harness.judged({}, {}, "reference", 1e-9)


def contender(folder, name, text):
    (folder / f"{name}.py").write_text(text)


def test_absent_and_inexpressible_rivals_keep_their_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "CONTENDERS", tmp_path)
    facts = {"gone": {"error": "ResolutionImpossible"}, "here": {"python": "p", "version": "1"}}
    monkeypatch.setattr(install, "manifest", lambda: facts)
    # Never imported: none of these packages exists.
    contender(tmp_path, "gone", "import gone\nPACKAGE = 'gone'\ndef w1(data, case): ...\n")
    contender(tmp_path, "never", "import never\nPACKAGE = 'never'\ndef w1(data, case): ...\n")
    contender(tmp_path, "here", "import here\nPACKAGE = 'here'\nNOT = {'w1': 'no momentum'}\n")
    contender(tmp_path, "other", "PACKAGE = None\ndef w2(data, case): ...\n")
    found = harness.contenders("w1")
    assert found["gone"]["error"] == "ResolutionImpossible"
    assert "not installed" in found["never"]["error"]
    assert found["here"]["not"] == "no momentum"
    assert "other" not in found


def test_a_rival_that_dies_says_why():
    worker = harness.Worker("no_such_contender", {"python": harness.sys.executable}, 1)
    try:
        with pytest.raises(harness.Failure, match="no_such_contender"):
            worker.ask("load", workload="w1", case={}, data="", dtype="float64")
    finally:
        worker.close()


def test_a_race_between_processes(tmp_path):
    race = harness.Race("w1", 1, ["by_hand"], tmp_path)
    try:
        rows = race.run({"steps": 1, "order": 2, "tasks": 2}, repeats=2, memory=False)
    finally:
        race.close()
    assert rows["torch.autograd loop"]["ratio"] == 1
    assert rows["torch.func vmap"]["verdict"] == "right"
    assert len(rows["torch.func vmap"]["cpu"]) == 2


@pytest.mark.parametrize(
    ("target", "value", "words"),
    [
        # Ratios 1/8, 2/8, 3/12: their median is a quarter.
        (Target("t", "metafocus vmap", "slow", 0.25), 0.25, "met"),
        (Target("t", "metafocus vmap", "slow", 0.2), 0.25, "missed by 25.0%"),
        (Target("t", "metafocus vmap", "fastest", 1.05), 1.0, "met"),
        (Target("t", "metafocus vmap", "leanest", 1.2, "process_bytes"), 1.5, "missed by 25.0%"),
        (Target("t", "metafocus vmap", "fastest", 1.5, "process_bytes"), 1.5, "met"),
        (Target("t", "metafocus vmap", "bad", 1.0), None, "not measured"),
        (Target("t", "metafocus vmap", "gone", 1.0), None, "not measured"),
    ],
    ids=["met", "missed", "fastest", "leanest", "memory of the fastest", "wrong", "absent"],
)
def test_verdicts_are_computed(target, value, words):
    (verdict,) = verdicts(target, [RUN])
    assert verdict.value == (None if value is None else pytest.approx(value))
    assert verdict.words() == words


def test_on_several_threads_the_clock_decides():
    """A thread that spins while it waits for another has CPU time as well."""
    rows = {
        "metafocus vmap": timed(2.0, 2.0, wall=[1.0, 1.0]),
        "a": timed(1.0, 1.0, wall=[4.0, 4.0]),
        "b": timed(3.0, 3.0, wall=[2.0, 2.0]),
    }
    target = Target("t", "metafocus vmap", "fastest", 1.0)
    for threads, other, value in ((1, "a", 2.0), (2, "b", 0.5)):
        (verdict,) = verdicts(target, [{**RUN, "threads": threads, "rows": rows}])
        assert (verdict.other, verdict.value) == (other, value)
        assert (verdict.cpu, verdict.wall) == ((2.0, 0.25) if other == "a" else (2 / 3, 0.5))


def test_a_target_speaks_of_its_cases_only():
    assert verdicts(Target("t", "metafocus vmap", "slow", 1, case={"order": 1}), [RUN]) == []


def test_the_page_shows_verdicts_and_reasons(tmp_path):
    text = {"workload": "w1", "title": "W1", "reference": "slow", "runs": [RUN]}
    environment = {"torch": "2", "python": "3", "machine": "m", "cores": 2}
    content = json.dumps({**text, "environment": environment})
    (tmp_path / "rivals_w1.json").write_text(content)
    lines = report.sections(tmp_path, tmp_path / "figures", "figures")
    page = "\n".join(lines)
    assert "absent ResolutionImpossible" in page
    assert "| bad | 1 | 1.0e-01 | wrong |" in page
    assert "![CPU time relative to the reference](figures/rivals_w1.svg)" in page
    assert (tmp_path / "figures" / "rivals_w1.svg").stat().st_size > 1000
    # The fastest first.
    assert page.index("| **metafocus vmap** |") < page.index("| fast |") < page.index("| slow |")
    first = (tmp_path / "figures" / "rivals_w1.svg").read_bytes()
    report.sections(tmp_path, tmp_path / "figures", "figures")
    assert (tmp_path / "figures" / "rivals_w1.svg").read_bytes() == first


def test_quartiles_are_of_per_repetition_ratios():
    assert harness.quartiles([1.0, 4.0, 9.0], [1.0, 2.0, 3.0])[1] == 2
    assert harness.quartiles([3.0], [2.0]) == (1.5, 1.5, 1.5)


def test_data_are_cast_by_the_worker():
    data = {"x": [torch.ones(2, dtype=torch.float64)], "y": torch.arange(2)}
    given = cast(data, torch.float32)
    assert given["x"][0].dtype == torch.float32
    assert given["y"].dtype == torch.int64
    assert flat([torch.ones(2, 2), torch.zeros(1)]).shape == (5,)


def test_pip_errors_are_told_in_one_line():
    stderr = "some lines\nERROR: No matching distribution found for nothing==1\nhint\n"
    error = install.subprocess.CalledProcessError(1, "pip", stderr=stderr)
    assert install.last_words(error) == "ERROR: No matching distribution found for nothing==1"
