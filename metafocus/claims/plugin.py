"""Follows a run of pytest and writes what each claim measured to a report during the run.

`Recorder` works where tests run: in the only process, or in each worker of pytest-xdist. It selects
the tests and attaches to each of pytest's reports what the test measured. `Reporter` works in the
process that the user started and writes the report anew after each test. A run that dies therefore
leaves a report, in which the tests that did not end are errors.
"""

from __future__ import annotations

import inspect
import json
import shlex
import tempfile
import time
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from metafocus.claims.marker import MEASURED, claims_of
from metafocus.claims.page import findings
from metafocus.claims.report import Case, Report, rows
from metafocus.files import write_json


def register(config: pytest.Config) -> None:
    """Add what the options ask for.

    Raises:
        pytest.UsageError: if a file to be written does not end in `.json`.
    """
    for option in ("claims", "claims_list"):
        name = getattr(config.option, option)
        if name and not name.endswith(".json"):
            raise pytest.UsageError(
                f"--{option.replace('_', '-')} {name}: give the name of a file that ends in .json"
            )
    reporter = None
    if config.option.claims and not config.option.collectonly and _worker(config) is None:
        reporter = Reporter(config)
        config.pluginmanager.register(reporter, "metafocus.claims.reporter")
    config.pluginmanager.register(Recorder(config, reporter), "metafocus.claims.recorder")


def _worker(config: pytest.Config) -> dict[str, Any] | None:
    """What pytest-xdist gave this process, if it is one of its workers."""
    return getattr(config, "workerinput", None)


class Recorder:
    """Selects the tests, and attaches to each report what its test measured."""

    def __init__(self, config: pytest.Config, reporter: Reporter | None):
        self.config = config
        self.reporter = reporter
        self.selected = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the claims of `--claims-only`; refuse markers that are incomplete."""
        try:
            rest = _select(items, self.config.option.claims_only)
        except pytest.UsageError as error:
            # pytest-xdist drops what stops a worker: its controller raises this error again.
            if _worker(self.config) is not None:
                self.config.workeroutput["claims_error"] = str(error)  # type: ignore[attr-defined]
            raise
        self.config.hook.pytest_deselected(items=rest)
        self.selected: bool = True

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Raise what stopped a worker of pytest-xdist."""
        message = getattr(node, "workeroutput", {}).get("claims_error")
        if message:
            raise pytest.UsageError(message)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Say which claims are about to run."""
        # pytest calls this after errors of the collection too.
        broken = session.testsfailed and not self.config.option.continue_on_collection_errors
        if not self.selected or broken:
            return
        cases = {item.nodeid: _case(item) for item in session.items if claims_of(item)}
        worker, path = _worker(self.config), self.config.option.claims_list
        if path:
            _write_list(Path(path), cases, self.config.rootpath)
        elif self.reporter is not None:
            self.reporter.start(cases, _environment())
        elif worker is not None and "claims_cases" in worker:
            # Before pytest-xdist sends the names of the tests, for the reporter to read then.
            found = {name: asdict(case) for name, case in cases.items()}
            write_json(Path(worker["claims_cases"]), [found, _environment()])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach `claim_phase`: verdict, message, seconds, measured."""
        report = yield
        claims = claims_of(item)
        if not claims:
            return report
        measured = item.stash.get(MEASURED, {}) if call.when == "call" else {}
        verdict, message = _verdict(call, any(claim["asserted"] for claim in claims))
        silent = [claim["id"] for claim in claims if claim["id"] not in measured]
        if call.when == "call" and call.excinfo is None and silent:
            verdict, message = "error", f"passed without a measured value: {silent}"
            report.outcome, report.longrepr = "failed", message
        phase = (verdict, message, call.duration, measured)
        report.claim_phase = phase  # type: ignore[attr-defined]
        return report


class Reporter:
    """Gathers what the recorders attached, and writes the report."""

    def __init__(self, config: pytest.Config):
        option = config.option
        self.path: Any = config.invocation_params.dir / option.claims
        self.form = "full" if option.claims_full else "quick"
        self.command: str = shlex.join(["pytest", *config.invocation_params.args])
        self.only: list[str] = sorted(_ids(option.claims_only or ""))
        self.begun: float = time.perf_counter()
        self.cases: dict[str, Case] | None = None
        self.environment: dict[str, Any] = {}
        self.scratch: tempfile.TemporaryDirectory[str] | None = None

    def start(self, cases: dict[str, Case], environment: dict[str, Any]) -> None:
        """Take the tests that are about to run."""
        self.cases, self.environment = cases, environment
        try:
            self.report().write(self.path)
        except OSError as error:
            self.cases = None
            raise pytest.UsageError(f"--claims {self.path} cannot be written: {error}") from None

    def report(self) -> Report:
        """Return what is known so far."""
        settings = {
            "command": self.command,
            "full": self.form == "full",
            "only": self.only,
            "seconds": time.perf_counter() - self.begun,
        }
        return Report(rows((self.cases or {}).values(), self.form), self.environment, settings)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker of pytest-xdist where to write which tests it collected."""
        if self.scratch is None:
            self.scratch = tempfile.TemporaryDirectory()
        path = Path(self.scratch.name) / f"{node.workerinput['workerid']}.json"
        node.workerinput["claims_cases"] = str(path)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any) -> None:
        """Start with the tests of the first worker: all workers collect the same."""
        path = Path(node.workerinput["claims_cases"])
        if self.cases is None and path.exists():
            cases, environment = json.loads(path.read_text(encoding="utf-8"))
            self.start({name: Case(**case) for name, case in cases.items()}, environment)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a phase of a test; write the report when the test has ended."""
        case = (self.cases or {}).get(report.nodeid)
        if case is None:
            return
        # pytest-xdist makes a report of its own for the test in which a worker died.
        died = ("error", str(report.longrepr), 0.0, {})
        phase: Any = getattr(report, "claim_phase", died)
        case.add(*phase)
        case.ended = report.when == "teardown"
        if case.ended:
            self.report().write(self.path)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        """In verbose output a claim that ran has its verdict instead of PASSED or FAILED."""
        phase = getattr(report, "claim_phase", None)
        if phase is None or report.when != "call" or hasattr(report, "wasxfail"):
            return None
        letter = {"passed": ".", "failed": "F"}.get(report.outcome)
        return None if letter is None else (report.outcome, letter, phase[0].upper())

    def pytest_sessionfinish(self) -> None:
        """Write the report for the last time."""
        if self.cases is not None:
            self.report().write(self.path)
        if self.scratch is not None:
            self.scratch.cleanup()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the findings."""
        if self.cases is not None:
            terminalreporter.section("claims")
            terminalreporter.write_line(findings(self.report()))


def _select(items: list[pytest.Item], only: str | None) -> list[pytest.Item]:
    """Leave the tests of the claims `only` in `items`, and return the others."""
    stated = [{claim["id"] for claim in claims_of(item)} for item in items]
    if only is None:
        return []
    wanted, known = _ids(only), set().union(*stated)
    if not wanted or wanted - known:
        raise pytest.UsageError(f"unknown claims {sorted(wanted - known)}; known: {sorted(known)}")
    pairs = list(zip(items, stated, strict=True))
    items[:] = [item for item, ids in pairs if ids & wanted]
    return [item for item, ids in pairs if not ids & wanted]


def _ids(text: str) -> set[str]:
    return {word.strip() for word in text.split(",")} - {""}


def _case(item: pytest.Item) -> Case:
    # Not the node id alone: with groups, pytest-xdist appends "@group" to it.
    name = getattr(item, "originalname", None) or item.name
    parent = item.parent.nodeid if item.parent is not None else ""
    case = item.callspec.id if hasattr(item, "callspec") else ""  # type: ignore[attr-defined]
    docstring = inspect.getdoc(getattr(item, "function", None)) or ""
    return Case(f"{parent}::{name}", case, docstring, claims_of(item))


def _verdict(call: pytest.CallInfo[None], asserted: bool) -> tuple[str, str]:
    """What a phase says about the claim, and why."""
    if call.excinfo is None:
        return "reproduced" if asserted or call.when != "call" else "reported", ""
    error = call.excinfo.value
    if isinstance(error, pytest.skip.Exception):
        return "skipped", str(error)
    if isinstance(error, pytest.FixtureLookupError):
        return "error", f"there is no fixture {error.argname!r}"
    failed = isinstance(error, AssertionError | pytest.fail.Exception)
    # A failure outside a test, or in a test that asserts nothing, is not a finding about the claim.
    contradicted = failed and asserted and call.when == "call"
    message = call.excinfo.exconly().splitlines()[0]
    return "contradicted" if contradicted else "error", message


def _write_list(path: Path, cases: dict[str, Case], root: Path) -> None:
    """Write each claim of each test once, in the order of a report, and where its test begins."""
    hidden = {"measured", "verdict", "seconds", "message", "form"}
    listed = [{k: v for k, v in row.items() if k not in hidden} for row in rows(cases.values(), "")]
    write_json(path, [{**row, "root": str(root)} for row in listed])


def _environment() -> dict[str, Any]:
    import torch

    from metafocus.comparison.report import environment

    found = environment(torch.get_default_dtype())
    del found["dtype"]  # each claim chooses its own
    return found
