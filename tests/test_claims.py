"""Claims as tests: what the plugin records, what the report says, and `metafocus reproduce`."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from test_package import build

import metafocus.claims.process
from metafocus.__main__ import main
from metafocus.claims.page import findings, measured, page
from metafocus.claims.process import find_tests, run_claims
from metafocus.claims.report import NEVER_ENDED, Report
from metafocus.errors import DataError

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
SUITE = ROOT / "tests" / "repro"
HEAD = "import os, pytest, torch\n"


def source(id: str, body: str, more: str = "", head: str = "", arguments: str = "claim") -> str:
    """A test that states a claim."""
    return (
        f'\n\n@pytest.mark.claim("{id}", paper="arXiv 1", says="{id} | holds", published="1"{more})'
        f"\n{head}def test_{id.lower()}({arguments}):\n    '''Tolerance: none.'''\n    {body}\n"
    )


CASES = "@pytest.mark.parametrize('x', [1.0, 2.0, 3.0])\n"
BROKEN = "\n\n@pytest.fixture\ndef broken():\n    raise AssertionError('training failed')\n"

# id: (source, verdict, message, measured)
VERDICTS = {
    "T2": (
        source("T2", "claim({'a': 1.0, 'b': torch.ones(2, requires_grad=True), 'c': 1e400})"),
        *("reproduced", "", {"": {"a": 1.0, "b": [1.0, 1.0], "c": "inf"}}),
    ),
    "T3": (
        source("T3", "pytest.skip('no data')"),
        *("skipped", "no data", {}),
    ),
    "T4": (
        source("T4", "claim(0.1)", ", asserted=False, note='small'"),
        *("reported", "", {"": 0.1}),
    ),
    # What follows, up to T9, is no finding about the claim.
    "T5": (
        source("T5", "claim(1); raise OSError('disk')"),
        *("error", "OSError: disk", {"": 1}),
    ),
    "T6": (
        BROKEN + source("T6", "claim(1)", arguments="claim, broken"),
        *("error", "AssertionError: training failed", {}),
    ),
    "T7": (
        source("T7", "claims(1)", arguments="claims"),
        *("error", "there is no fixture 'claims'", {}),
    ),
    "T8": (
        source("T8", "claim(1); assert False, 'no'", ", asserted=False"),
        *("error", "AssertionError: no", {"": 1}),
    ),
    "T9": (
        source("T9", "pass", arguments=""),
        *("error", "passed without a measured value: ['T9']", {}),
    ),
    "T10": (
        source("T10", "claim(x); assert x < 3, 'above'", head=CASES, arguments="x, claim"),
        *("contradicted", "AssertionError: above", {"1.0": 1.0, "2.0": 2.0, "3.0": 3.0}),
    ),
    "T11": (
        source("T11", "claim(5); assert False, 'known'", head="@pytest.mark.xfail\n"),
        *("contradicted", "AssertionError: known", {"": 5}),
    ),
    "SABA": (
        source("SABA", "claim(1)", head="@pytest.mark.skip('later')\n"),
        *("skipped", "later", {}),
    ),
}
EVERY = HEAD + "".join(entry[0] for entry in VERDICTS.values())
EVERY += "\n\ndef test_without_a_claim():\n    pass\n"


def run(*words: object) -> tuple[int, str, str]:
    """`metafocus reproduce` with these words: its code, what it printed and its error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["reproduce", *map(str, words)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def suite(tmp_path):
    """The directory of a foreign suite: `suite(name=source, ...)` writes its files."""

    def write(**files: str) -> Path:
        folder = tmp_path / "claims"
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / f"test_{name}.py").write_text(HEAD + text)
        return folder

    return write


# --- what is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [(), ("-n", "2", "--dist", "loadgroup")])
def test_verdicts(pytester, workers):
    """The same rows from one process and from several."""
    pytester.makepyfile(
        test_a=EVERY, test_b=HEAD + source("B", "claim(1)", head="@pytest.mark.xdist_group('g')\n")
    )
    arguments = ("-p", "metafocus_claims", "--claims", "out/report.json", *workers)
    start = pytester.runpytest_subprocess if workers else pytester.runpytest_inprocess
    done = start("-v", *arguments)
    report = Report.from_json(pytester.path / "out" / "report.json")
    rows = {row["id"]: row for row in report.rows}
    assert list(rows) == [*list(VERDICTS)[:-1], "B", "SABA"]
    for id, (_, verdict, message, values) in VERDICTS.items():
        row = rows[id]
        assert (row["verdict"], row["message"], row["measured"]) == (verdict, message, values), id
        assert row["test"] == f"test_a.py::test_{id.lower()}" and row["form"] == "quick"
        assert row["docstring"] == "Tolerance: none."
    assert not report.holds and report.environment["threads"] >= 1
    assert " -v -p metafocus_claims --claims out/report.json" in report.settings["command"]
    counts = "12 claims: 2 reproduced, 1 reported, 2 skipped, 5 error, 2 contradicted. "
    done.stdout.fnmatch_lines(["*REPRODUCED*", "*REPORTED*", "*= claims =*", f"{counts}*"])
    text = (pytester.path / "out" / "report.md").read_text()
    assert text.splitlines()[2].startswith(f"**{counts}Contradicted: T10 (T10 \\| holds); T11 ")
    assert "T4 \\| holds (small). arXiv 1" in text and "5; AssertionError: known" in text
    assert max(line.replace("\\|", "").count("|") for line in text.splitlines()) == 6 + 1


def test_several_claims_of_one_test(pytester):
    both = source("T1", "claim(1, id='T1'); claim(2, id='T2')").replace(
        "\ndef", '\n@pytest.mark.claim("T2", paper="", says="", published="", asserted=False)\ndef'
    )
    pytester.makepyfile(HEAD + both)
    pytester.runpytest_inprocess("-p", "metafocus_claims", "--claims", "r.json")
    rows = Report.from_json("r.json").rows
    found = [(row["id"], row["verdict"], row["measured"][""]) for row in rows]
    assert found == [("T1", "reproduced", 1), ("T2", "reported", 2)]


def test_k_selects_cases_and_full_is_seen(pytester):
    pytester.makepyfile(HEAD + source("T1", "claim(claim.full)", head=CASES, arguments="x, claim"))
    words = ("-p", "metafocus_claims", "--claims", "r.json", "-k", "2.0", "--claims-full")
    pytester.runpytest_inprocess(*words).assert_outcomes(passed=1, deselected=2)
    (row,) = Report.from_json("r.json").rows
    assert row["measured"] == {"2.0": True} and row["form"] == "full"


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("", ["--claims", "r.txt"], "--claims r.txt: give the name of a file that ends in .json"),
        ("", ["--claims", "r.json/x.json"], "cannot be written"),
        ("", ["--claims-only", "T1,T99"], "unknown claims ['T99']; known: ['T1']"),
        ("", ["--claims-only", ","], "unknown claims []; known: ['T1']"),
        ("@pytest.mark.claim('A')", [], "3 required keyword-only arguments: 'paper', 'says'"),
        ("@pytest.mark.claim('A', paper=1, says='', published='')", [], "paper must be a string"),
        ("@pytest.mark.claim('A,B', paper='', says='', published='')", [], "without commas"),
        ("@pytest.mark.claim('T1', paper='', says='', published='')", [], "claim 'T1' twice"),
    ],
)
def test_wrong_options_and_markers(pytester, text, options, says):
    body = source("T1", "claim(1)", head=f"{text}\n" if text else "")
    pytester.makepyfile(HEAD + body)
    (pytester.path / "r.json").write_text("before")
    options = options or ["--claims-only", "T1"]
    done = pytester.runpytest_inprocess("-p", "metafocus_claims", *options)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert says in done.stderr.str() + done.stdout.str()
    assert (pytester.path / "r.json").read_text() == "before"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("claim(1)", "states no claim: add @pytest.mark.claim(...)"),
        ("claim(object())", "not object"),
        ("claim(1, id='T9')", "states the claims ['T1'], not 'T9'"),
    ],
)
def test_wrong_uses_of_the_fixture(pytester, body, says):
    text = source("T1", body)
    if "no claim" in says:
        text = re.sub("@pytest.mark.claim.*", "", text)
    pytester.makepyfile(HEAD + text)
    done = pytester.runpytest_inprocess("-p", "metafocus_claims")
    done.assert_outcomes(failed=1)
    assert says in done.stdout.str()


def test_a_project_without_claims_is_left_alone(pytester):
    """Its own marker and fixture of the same names work, and nothing of ours is imported."""
    pytester.makepyfile("""
        import sys
        import pytest

        @pytest.fixture
        def claim():
            return "an insurance"

        @pytest.mark.claim("fire", 3)
        def test_own_names(claim):
            assert claim == "an insurance"

        def test_nothing_is_imported():
            assert not {"torch", "metafocus"} & set(sys.modules)
    """)
    words = ("-p", "metafocus_claims", "--strict-markers")
    pytester.runpytest_subprocess(*words).assert_outcomes(passed=2)


# --- a process that dies -------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_dies(suite, tmp_path, workers):
    """What was measured before stays; the rest of its file is an error, other files go on."""
    died = source("T2", "claim(2)") + source("T4", "claim(4); os._exit(9)") + source("T5", "pass")
    folder = suite(a=source("T1", "claim(1)"), b=died, c=source("T3", "claim(3)"))
    report = run_claims(folder, tmp_path / "running", workers=workers)
    found = [(row["id"], row["verdict"], row["message"]) for row in report.rows]
    whole = [(f"T{i}", "reproduced", "") for i in (1, 2, 3)]
    assert found == [*whole, *((f"T{i}", "error", NEVER_ENDED) for i in (4, 5))]


def test_a_run_that_was_stopped_goes_on(suite, tmp_path):
    """The files that have ended are not run again, unless code has changed."""
    ran, again = tmp_path / "ran", tmp_path / "again"
    noted = source("T1", f"claim(1); open({str(ran)!r}, 'a').write('a')")
    # A background job of a shell starts with SIGINT ignored.
    interrupt = "__import__('signal').signal(2, __import__('signal').default_int_handler)"
    stop = f"os.path.exists({str(again)!r}) or ({interrupt}, os.kill(os.getpid(), 2))"
    folder = suite(a=noted, b=source("T2", f"{stop}; claim(2)"))
    with pytest.raises(KeyboardInterrupt):
        run_claims(folder, tmp_path / "running")
    again.touch()
    report = run_claims(folder, tmp_path / "running")
    assert [row["verdict"] for row in report.rows] == ["reproduced", "reproduced"]
    assert ran.read_text() == "a"
    suite(c="")
    run_claims(folder, tmp_path / "running")
    assert ran.read_text() == "aa"


def test_folders_of_a_suite_keep_their_names(suite, tmp_path, monkeypatch):
    folder = suite(a=source("T1", "claim(1)"))
    monkeypatch.chdir(folder)  # Without a settings file, pytest's names begin where it is called.
    (folder / "inner").mkdir()
    (folder / "inner" / "test_b.py").write_text(HEAD + source("T2", "claim(2)"))
    report = run_claims(folder, tmp_path / "running", only=["T2"])
    (row,) = report.rows
    assert row["test"] == "inner/test_b.py::test_t2" and report.settings["only"] == ["T2"]


# --- the command ---------------------------------------------------------------------------------


def test_a_claim_of_the_library_is_reproduced(tmp_path):
    code, out, err = run("--only", "T1", "--output_dir", tmp_path)
    assert code == 0, out + err
    assert "REPRODUCED" in out and "1 claim: 1 reproduced. No claim is contradicted." in out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "reproduction.json",
        "reproduction.md",
    ]
    report = Report.from_json(tmp_path / "reproduction.json")
    (row,) = report.rows
    assert (row["id"], row["verdict"], row["form"]) == ("T1", "reproduced", "quick")
    assert row["test"].startswith("tests/repro/test_implicit.py::")
    assert 0 < row["measured"][""]["CG 50"] < 1e-6 and row["seconds"] > 0
    assert report.environment["threads"] == 1 and report.settings["full"] is False
    text = (tmp_path / "reproduction.md").read_text()
    assert "`metafocus reproduce --only T1`" in text and "arXiv 2006.16218" in text


def test_list_and_update(suite, tmp_path):
    out = tmp_path / "out"
    folder = suite(a=source("T2", "claim(1)"), b=source("T3", "claim(1.5)"))
    code, text, _ = run(folder, "--list", "--only", "T3")
    assert (code, text) == (0, "T3  arXiv 1  T3 | holds\n")
    code, text, _ = run(folder, "--output_dir", out)
    assert code == 0 and "the whole report: 2 claims: 2 reproduced." in text

    suite(b=source("T3", "claim(claim.full); assert False, 'no'"))
    words = (folder, "--output_dir", out, "--only", "T3", "--update", "--full")
    assert run(*words)[0] == 1
    report = Report.from_json(out / "reproduction.json")
    rows = [(r["id"], r["form"], r["measured"][""], r["verdict"]) for r in report.rows]
    assert rows == [("T2", "quick", 1, "reproduced"), ("T3", "full", True, "contradicted")]
    assert report.settings["full"] is False and report.settings["only"] == []
    text = (out / "reproduction.md").read_text()
    assert text == page(report, "reproduction.json")
    assert f"`metafocus reproduce {folder}` in" in text and " T3 ran again later, in " in text
    assert "yes; AssertionError: no" in text and "**contradicted**, full" in text

    # A run that holds may end with 1 for what the report had before.
    suite(a=source("T2", "claim(1)"))
    code, text, _ = run(folder, "--output_dir", out, "--only", "T2", "--update")
    assert code == 1 and "the whole report: 2 claims: 1 reproduced, 1 contradicted." in text


def test_a_report_that_cannot_be_updated(suite, tmp_path):
    rows = [{"id": "T1", "test": "test_t1"}]
    with pytest.raises(DataError, match="one report cannot have rows of both"):
        Report(rows, {"torch": "2"}).over(Report(rows, {"torch": "1"}))
    (tmp_path / "reproduction.json").write_text("{}")
    words = (suite(), "--output_dir", tmp_path, "--only", "T1", "--update")
    assert "is not a report of claims" in run(*words)[2]


@pytest.mark.parametrize(
    ("files", "words", "says"),
    [
        ({}, ("absent",), "absent does not exist: name a directory of tests that state claims."),
        ({"a": "def test_a(): pass\n"}, ("DIR",), "has no test with the marker pytest.mark.claim"),
        ({"a": "import no_such_module\n"}, ("DIR",), "could not be collected: E ModuleNotFound"),
        ({"a": source("T2", "")}, ("DIR", "--only", "T2,T9"), "unknown claims ['T9']; known"),
        (
            {"a": source("T2", "")},
            ("DIR", "--only", "T9", "--workers", "2"),
            "unknown claims ['T9']; known: ['T2']",
        ),
        ({}, ("DIR", "--only", ","), "--only is empty: name claims such as T1,T12"),
        ({}, ("DIR", "--update"), "choose with --only which are"),
    ],
)
def test_what_cannot_run_is_one_line(suite, tmp_path, files, words, says):
    folder = suite(**files)
    words = [folder if word == "DIR" else word for word in words]
    code, _, err = run(*words, "--output_dir", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and says in err
    assert not list(tmp_path.glob("out/*.json"))


def test_an_installation_without_the_librarys_claims_or_without_pytest(suite, monkeypatch):
    folder = suite(a=source("T1", "claim(1)"))
    assert find_tests() == SUITE and find_tests(folder) == folder
    monkeypatch.setattr(metafocus.claims.process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pytest is not installed: pip install pytest"):
        run_claims(folder, folder / "running")
    monkeypatch.setattr(metafocus.claims.process, "_PACKAGES", folder)
    code, _, err = run()
    assert code == 2 and "not part of an installed package" in err and "clone" in err


# --- the page ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cases", "text"),
    [
        ({}, ""),
        ({"": True}, "yes"),
        ({"": [1, 2.5, 1e-9]}, "1, 2.5, 1e-09"),
        ({"": list(range(20))}, "0 to 19"),
        ({"": {"a": {"b": 1, "c": [[1, 2], [3]]}}}, "a b 1; a c 1, 2 / 3"),
        ({"x": {"a": 1}, "y": {"b": 2}}, "a 1; b 2"),
        ({str(i): {"a": i, "b": "same"} for i in range(9)}, "a 0 to 8 (9 cases); b same (9 cases)"),
    ],
)
def test_measured_values_on_one_line(cases, text):
    assert measured(cases) == text


def test_an_empty_report_has_a_page():
    assert findings(Report([])) == "0 claims: none was run."
    assert "**0 claims: none was run.**" in page(Report([]), "x.json")


# --- the library's own claims --------------------------------------------------------------------


def test_every_test_of_the_library_states_a_claim(tmp_path):
    """Listed, not run: T1 to T27 are all there, and no test is without a claim."""
    path = tmp_path / "list.json"
    command = [sys.executable, "-m", "pytest", str(SUITE), "-q", "--claims-list", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    listed = json.loads(path.read_text())
    assert all(claim["docstring"] for claim in listed)
    written = {
        f"tests/repro/{file.name}::{name}"
        for file in SUITE.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert written == {claim["test"] for claim in listed}, "mark them with pytest.mark.claim"
    ids = {claim["id"] for claim in listed}
    assert {f"T{n}" for n in range(1, 28)} | {"TTT-E2E", "qTTT", "FAULTS"} <= ids


def test_no_claim_runs_pytest():
    for path in SUITE.glob("*.py"):
        assert not re.search(r"pytest\.main|[\"']pytest[\"']", path.read_text()), path.name


def test_a_page_shows_the_picture_beside_its_report(tmp_path):
    report = Report([], {}, {})
    report.write(tmp_path / "found.json")
    assert "![" not in (tmp_path / "found.md").read_text()
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "found.svg").write_text("<svg/>")
    report.write(tmp_path / "found.json")
    assert "(figures/found.svg)" in (tmp_path / "found.md").read_text()


def test_the_page_in_the_documentation_is_what_its_numbers_say():
    """docs/reproduction.md is the page of docs/reproduction.json: nobody has edited it."""
    report = Report.from_json(ROOT / "docs" / "reproduction.json")
    assert (ROOT / "docs" / "reproduction.md").read_text() == page(
        report, "reproduction.json", "figures/reproduction.svg"
    )
    assert report.holds


# --- docs/claims.md, as a stranger uses it -------------------------------------------------------


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """The scripts of an environment with the wheel, and with the packages of this one."""
    place = tmp_path_factory.mktemp("stranger")
    wheel = build("wheel", place / "wheel")
    venv.create(place / "env", with_pip=False)
    python = place / "env" / "bin" / "python"
    install = ("-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    subprocess.run([sys.executable, *map(str, install)], check=True, capture_output=True)
    (site,) = (place / "env" / "lib").glob("python*/site-packages")
    # A path in a .pth file: the packages there, but not what their own .pth files add.
    (site / "others.pth").write_text(str(Path(pytest.__file__).parent.parent))
    return python.parent


@pytest.mark.slow
def test_the_example_of_the_documentation_from_an_installed_wheel(stranger, tmp_path):
    """Every command of the page, in a directory outside the repository."""
    text = (ROOT / "docs" / "claims.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    (commands,) = re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "test_unrolling.py").write_text(example)
    environment = {"PATH": str(stranger), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    printed = []
    for command in commands.splitlines():
        name, *words = command.partition("#")[0].split()
        if name == "pip":
            continue
        script = [stranger / "python", "-m", "pytest"] if name == "pytest" else [stranger / name]
        done = subprocess.run(
            [*map(str, script), *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=environment,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    assert len(printed) == 5 and printed[0].startswith("C1  Grazzi et al.")
    where = "import metafocus; print(metafocus.__file__)"
    command = [str(stranger / "python"), "-c", where]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert str(stranger.parent) in found.stdout

    # The page shows this report; seconds differ.
    shown = [line[2:] for line in text.splitlines() if re.match(r"> \| C\d", line)]
    assert len(shown) == 2
    for name in ("report.md", "reproduction/reproduction.md"):
        written = (tmp_path / name).read_text()
        assert "**2 claims: 2 reproduced. No claim is contradicted.**" in written
    for line in shown:
        start = line.rpartition(" | ")[0]
        assert start in (tmp_path / "report.md").read_text()
