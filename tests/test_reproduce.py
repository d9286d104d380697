"""`metafocus reproduce`: from claims to a report, also where a claim fails or a process dies."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import metafocus.claims.suite
from metafocus.__main__ import main
from metafocus.claims.page import measured, page
from metafocus.claims.suite import Reproduction, find_suite, reproduce
from metafocus.errors import DataError

SUITE = Path(__file__).parent / "repro"

CLAIM = """
@pytest.mark.claim("{id}", paper="arXiv 1", says="{id} | holds", published="1"{more})
"""

GOOD = (
    "import pytest\n"
    + CLAIM.format(id="T2", more="")
    + """
def test_t2(claim):
    '''The paper. Tolerance: none.'''
    claim({"a": 1.0, "nan": float("nan")})
"""
)


@pytest.fixture
def suite(tmp_path):
    """A suite of one's own: the fixtures of the real one, and tests to be written."""
    folder = tmp_path / "claims"
    folder.mkdir()
    shutil.copy(SUITE / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


def write(suite: Path, **bodies: str) -> None:
    for name, body in bodies.items():
        (suite / f"test_{name}.py").write_text(body)


def test_body(id: str, body: str, more: str = "", head: str = "") -> str:
    mark = CLAIM.format(id=id, more=more)
    return f"import os\nimport pytest\n{mark}{head}def test_{id.lower()}(claim):\n    {body}\n"


test_body.__test__ = False


def run(*words: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["reproduce", *map(str, words)])
    return code, out.getvalue(), err.getvalue()


# --- the command ---------------------------------------------------------------------------------


def test_a_claim_of_the_suite_is_reproduced(tmp_path):
    code, out, err = run("--only", "T1", "--output", tmp_path)
    assert code == 0, out + err
    assert "[  1/1] reproduced" in out and "1 reproduced" in out
    told = json.loads((tmp_path / "reproduction.json").read_text())
    (row,) = told["rows"]
    assert (row["id"], row["verdict"]) == ("T1", "reproduced")
    assert 0 < row["measured"][""]["CG 50"] < 1e-6
    assert "Tolerance" in row["docstring"] and row["seconds"] > 0
    assert told["environment"]["threads"] == 1 and told["settings"]["full"] is False
    text = (tmp_path / "reproduction.md").read_text()
    assert "`metafocus reproduce --only T1`" in text and "arXiv 2006.16218" in text


def test_a_claim_that_fails_is_contradicted_with_its_number(suite, tmp_path):
    write(suite, x=test_body("T5", "claim({'slope': 0.5}); assert 0.5 == 1"))
    code, out, _ = run("--suite", suite, "--output", tmp_path / "out")
    assert code == 1
    assert "contradicted: T5 test_x.py::test_t5: slope 0.5 AssertionError" in out
    assert "1 contradicted" in out
    text = (tmp_path / "out" / "reproduction.md").read_text()
    assert "| **contradicted** |" in text and "slope 0.5; AssertionError" in text


def test_without_a_suite(tmp_path, monkeypatch):
    """As in an installation from a wheel, and for a wrong folder."""
    code, _, err = run("--suite", tmp_path)
    assert code == 2 and "holds no suite of claims" in err
    monkeypatch.setattr(metafocus.claims.suite, "__file__", str(tmp_path / "metafocus" / "x.py"))
    code, _, err = run("--output", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1
    assert "clone the repository" in err and "--suite CLONE/tests/repro" in err
    assert not (tmp_path / "out").exists()


def test_unknown_and_empty_words(suite, tmp_path):
    write(suite, x=GOOD)
    code, _, err = run("--suite", suite, "--only", "T2,T99", "--output", tmp_path / "out")
    assert code == 2 and "unknown claims ['T99']; known: ['T2']" in err
    assert run("--suite", suite, "--only", ",", "--output", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()


def test_pytest_is_asked_for(suite, monkeypatch):
    monkeypatch.setattr(metafocus.claims.suite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pytest is not installed: pip install 'metafocus\[dev\]'"):
        reproduce(suite)


# --- rows ----------------------------------------------------------------------------------------


def test_verdicts(suite):
    cases = "@pytest.mark.parametrize('x', [1.0, 2.0, 3.0])\n"
    write(
        suite,
        a=GOOD,
        b=test_body("T10", "claim(1); raise OSError('disk')"),
        c=test_body("T3", "pytest.skip('no data')"),
        d=test_body("T4", "claim(0.1)", more=", asserted=False, note='small'"),
        e=test_body("SABA", "pass"),
        f=test_body("T6", "claim(1)").replace("claim)", "claim, broken)")
        + "\n@pytest.fixture\ndef broken():\n    raise AssertionError('training failed')\n",
        g=test_body("T7", "claim(x); assert x < 3", head=cases).replace("claim)", "x, claim)"),
    )
    write(suite, h=test_body("T8", "claim(1); assert False", more=", asserted=False"))
    lines: list[str] = []
    found = reproduce(suite, progress=lines.append)
    rows = {row["id"]: row for row in found.rows}
    assert list(rows) == ["T2", "T3", "T4", "T6", "T7", "T8", "T10", "SABA"]
    assert {id: row["verdict"] for id, row in rows.items()} == {
        "T2": "reproduced",
        "T3": "skipped",
        "T4": "reported",
        # Neither is a finding about the claim.
        "T6": "error",
        "T8": "error",
        "T10": "error",
        "T7": "contradicted",
        "SABA": "error",
    }
    assert rows["T2"]["measured"] == {"": {"a": 1.0, "nan": "nan"}}
    assert rows["T7"]["measured"] == {"1.0": 1.0, "2.0": 2.0, "3.0": 3.0}
    assert rows["T10"]["message"] == "OSError: disk" and rows["T10"]["measured"] == {"": 1}
    assert "no data" in rows["T3"]["message"]
    assert "passed without a measured value: ['SABA']" in rows["SABA"]["message"]
    assert not found.holds and len(lines) == 10
    assert lines[-1].startswith("[ 10/10] error")
    text = page(found, "metafocus reproduce")
    assert "8 claims: 1 reproduced, 1 reported, 1 skipped, 4 error, 1 contradicted" in text
    assert "T2 \\| holds" in text and "(small)" in text


def test_a_process_that_dies_is_told(suite):
    """What was measured before stays; the rest is an error, not a silence."""
    write(suite, a=GOOD, b=test_body("T3", "claim(1); os._exit(9)"), c=test_body("T4", "claim(1)"))
    found = reproduce(suite)
    assert [row["verdict"] for row in found.rows] == ["reproduced", "error", "error"]
    assert found.rows[0]["measured"]
    assert found.rows[1]["message"] == "the process ended before this test did (exit code 9)"


def test_a_suite_that_cannot_be_collected(suite):
    write(suite, x="import nothing_of_this_name\n")
    with pytest.raises(DataError, match=r"could not be collected: .*nothing_of_this_name"):
        reproduce(suite)


def test_the_full_form_and_several_workers(suite):
    write(suite, x=test_body("T1", "claim(os.environ['METAFOCUS_REPRO'])"), y=GOOD)
    assert [r["measured"][""] for r in reproduce(suite, only=["T1"]).rows] == ["quick"]
    full = reproduce(suite, full=True, workers=2)
    assert [row["id"] for row in full.rows] == ["T1", "T2"] and full.holds
    assert full.rows[0]["measured"] == {"": "full"}


def test_the_suite_of_this_checkout_is_found():
    assert find_suite() == SUITE and find_suite(SUITE) == SUITE


def test_claims_that_are_run_again_replace_their_rows(suite, tmp_path):
    write(suite, a=GOOD, b=test_body("T3", "claim(1.5)"))
    out = tmp_path / "out"
    assert run("--suite", suite, "--output", out)[0] == 0
    write(suite, b=test_body("T3", "claim(os.environ['METAFOCUS_REPRO'])"))
    words = ("--suite", suite, "--output", out, "--only", "T3", "--update")
    assert run(*words, "--full")[0] == 0
    told = json.loads((out / "reproduction.json").read_text())
    rows = [(r["id"], r["form"], r["measured"][""]) for r in told["rows"]]
    assert rows == [("T2", "quick", {"a": 1.0, "nan": "nan"}), ("T3", "full", "full")]
    assert told["settings"]["full"] is False and told["settings"]["only"] == []
    text = (out / "reproduction.md").read_text()
    assert "`metafocus reproduce`, the quick form" in text and "; T3 again since, in " in text
    assert "| quick | reproduced |" in text and "| full | reproduced |" in text
    assert text == page(Reproduction(**told), "metafocus reproduce")

    told["environment"]["torch"] = "1.0"
    (out / "reproduction.json").write_text(json.dumps(told))
    code, _, err = run(*words)
    assert code == 2 and "rows of both cannot stand in one report" in err
    (out / "reproduction.json").write_text("{}")
    assert "is no report of `metafocus reproduce`" in run(*words)[2]
    code, _, err = run("--suite", suite, "--output", out, "--update")
    assert code == 2 and "say with --only which are" in err


# --- the page ------------------------------------------------------------------------------------


def test_measured_values_in_words():
    assert measured({}) == ""
    assert measured({"": True}) == "yes"
    assert measured({"": [1, 2.5, 1e-9]}) == "1, 2.5, 1e-09"
    assert measured({"": list(range(20))}) == "0 to 19"
    assert measured({"": {"a": {"b": 1, "c": [[1, 2], [3]]}}}) == "a b 1; a c 1, 2 / 3"
    assert measured({"x": {"a": 1}, "y": {"b": 2}}) == "a 1; b 2"
    assert measured({str(i): {"a": i, "b": "same"} for i in range(9)}) == (
        "a 0 to 8 (9 cases); b same (9 cases)"
    )


def test_an_empty_run_has_a_page():
    assert "**0 claims: none.**" in page(Reproduction([]), "x")


# --- the real suite ------------------------------------------------------------------------------


def test_every_test_of_the_suite_states_a_claim(tmp_path):
    """Collected, not run: each test function has a marker, and T1 to T27 are all there."""
    record = tmp_path / "record.jsonl"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(SUITE)]
    done = subprocess.run(
        [*command, "--claims", str(record), "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    items = [line for line in lines if "collected" in line]
    silent = sorted({i["collected"].partition("[")[0] for i in items if not i["claims"]})
    assert not silent, "mark them with pytest.mark.claim"
    assert all(i["docstring"] for i in items)
    ids = {claim["id"] for i in items for claim in i["claims"]}
    assert {f"T{n}" for n in range(1, 28)} <= ids
    assert {"TTT-E2E", "qTTT", "FAULTS"} <= ids


def test_the_page_in_the_documentation_is_what_its_numbers_say():
    """docs/reproduction.md is the page of docs/reproduction.json: nobody has typed in it."""
    docs = SUITE.parent.parent / "docs"
    told = json.loads((docs / "reproduction.json").read_text())
    found = Reproduction(**told)
    text = (docs / "reproduction.md").read_text()
    command = text.split("`")[1]
    assert text == page(found, command)
    assert found.holds
