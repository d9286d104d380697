"""pytest in a process of its own, for `metafocus reproduce`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metafocus.claims.report import Report
from metafocus.errors import DataError

_PACKAGES = Path(__file__).parent.parent.parent


def find_tests(path: str | Path | None = None) -> Path:
    """Return `path`, or the library's own claims: `tests/repro` of a checkout.

    Raises:
        DataError: if there are none, as in an installation from a wheel.
    """
    if path is None:
        path = _PACKAGES / "tests" / "repro"
        if not path.is_dir():
            raise DataError(
                "the library's own claims are not part of an installed package: name the directory "
                "of your claims, or clone the repository and run `metafocus reproduce` in it."
            )
    if not Path(path).exists():
        raise DataError(f"{path} does not exist: name a directory of tests that state claims.")
    return Path(path)


def list_claims(tests: Path, *, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return what the tests claim, without running them.

    Raises:
        DataError: if pytest is missing, or the tests cannot be collected or state no claim.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "list.json"
        _run(tests, ["--claims-list", str(path)], only, path, lambda line: None)
        return json.loads(path.read_text(encoding="utf-8"))


def run_claims(
    tests: Path,
    report: Path,
    *,
    full: bool = False,
    only: Sequence[str] = (),
    workers: int = 1,
    show: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run the tests that state claims, and return what they found.

    Args:
        tests: a directory or a file.
        report: where pytest writes its report, anew after each test.
        full: the published budgets instead of quick ones.
        only: ids of the claims to run; empty: all.
        workers: processes at once; more than one needs pytest-xdist.
        show: is called with each line that pytest prints.

    Returns:
        The report. Tests that did not end, because the process died, are errors.

    Raises:
        DataError: if pytest is missing, or the tests cannot be collected or state no claim.
    """
    options = ["--claims", str(report), *(["--claims-full"] if full else [])]
    if workers > 1:
        _require("xdist")
        # Each file in one process: the tests of a file share what they train.
        options += ["-n", str(workers), "--dist", "loadfile"]
    report.unlink(missing_ok=True)
    _run(tests, options, only, report, show)
    return Report.from_json(report)


def _run(
    tests: Path, options: list[str], only: Sequence[str], result: Path, show: Callable[[str], None]
) -> None:
    """Run pytest; raise its output as an error if it ended without writing `result`."""
    _require("pytest")
    # The module is named for installations whose entry points are older than it.
    command = [sys.executable, "-m", "pytest", str(tests), "-p", "metafocus_claims"]
    command += ["-m", "claim", "--verbosity=1", "--tb=short", *options]
    command += ["--claims-only", ",".join(only)] if only else []
    # The package that starts the tests is the one that they import.
    paths = [str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    log = []
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                log.append(line.strip())
                show(line.rstrip())
            code = process.wait()
        finally:
            process.kill()
    if code == 5:
        for path in (result, result.with_suffix(".md")):
            path.unlink(missing_ok=True)
        raise DataError(f"{tests} has no test with the marker pytest.mark.claim(...).")
    if not result.exists():
        raise DataError(f"the tests in {tests} could not be collected: {_reason(log)}")


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DataError(f"{package} is not installed: pip install pytest pytest-xdist.")


def _reason(log: list[str]) -> str:
    """The last errors that pytest printed, or its last line."""
    lines = list(dict.fromkeys(line for line in log if line))
    errors = [line for line in lines if re.match(r"(ERROR:?|E) ", line)]
    return "; ".join(errors[-3:] or lines[-1:]) or "pytest printed nothing"
