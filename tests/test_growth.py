"""The page on growth is that of its results, and its script goes on where it stopped."""

from __future__ import annotations

import json
import sys

from benchmarks import growth, growth_report


def test_the_page_is_that_of_the_results():
    assert growth_report.PAGE.read_text() == growth_report.committed()


def test_every_row_is_of_a_line_and_every_axis_has_its_figure():
    report = json.loads(growth.RESULTS.read_text())
    known = {(axis, line) for axis, (_, lines) in growth.AXES.items() for line in lines}
    assert {(row["axis"], row["line"]) for row in report["rows"]} <= known
    assert growth_report.measured(report)
    for axis in growth_report.measured(report):
        assert (growth_report.FIGURES / f"{axis}.svg").exists()


def test_a_run_goes_on_and_leaves_out_what_is_larger_than_a_failure(tmp_path, monkeypatch):
    asked = []

    def fresh(axis, line, count, limit):
        asked.append((line, count))
        if line == "per_example=True" and count > 1:
            return {"error": "more than 1 s"}
        return {"seconds": 1.0, "peak_bytes": 1024}

    monkeypatch.setattr(growth, "fresh", fresh)
    output = tmp_path / "growth.json"
    words = ["growth.py", "--axes", "rows", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    growth.main()
    shared = [(line, count) for line, count in asked if line == "shared fast weights"]
    assert [count for _, count in shared] == growth.AXES["rows"][0]
    assert [count for line, count in asked if line == "per_example=True"] == [1, 4]
    report = json.loads(output.read_text())
    # One point is forgotten: it alone is measured again.
    report["rows"] = report["rows"][1:]
    output.write_text(json.dumps(report))
    del asked[:]
    growth.main()
    assert asked == [("shared fast weights", 1)]
