"""pytest in processes of its own, for `metafocus reproduce`: a sweep over the files of tests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metafocus.cells import run_cells
from metafocus.claims.report import Report
from metafocus.digests import digest
from metafocus.errors import DataError

_INTERRUPTED, _NONE = 2, 5
"""What pytest ends with after Ctrl-C, and where it found no test."""
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
        _run([str(tests), "--claims-list", str(path)], only, path, lambda line: None)
        return json.loads(path.read_text(encoding="utf-8"))


def run_claims(
    tests: Path,
    folder: Path,
    *,
    full: bool = False,
    only: Sequence[str] = (),
    workers: int = 1,
    show: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run the tests that state claims, and return what they found.

    It is a sweep over the files of tests. After a kill, the same call goes on with the files that
    have not ended, if no code has changed.

    Args:
        tests: a directory or a file.
        folder: of the sweep; it can be removed afterwards.
        full: the published budgets instead of quick ones.
        only: ids of the claims to run; empty: all.
        workers: files at once, each in a process of its own.
        show: is called with each line that pytest prints.

    Returns:
        The report. Tests that did not end, because their process died, are errors.

    Raises:
        DataError: if pytest is missing, or the tests cannot be collected or state no claim.
    """
    stated: dict[tuple[str, str], set[str]] = {}
    for claim in list_claims(tests, only=only):
        stated.setdefault((claim["root"], claim["test"].partition("::")[0]), set()).add(claim["id"])
    cells = [
        {"root": root, "file": file, "ids": sorted(ids), "full": full, "code": _code(root, file)}
        for (root, file), ids in stated.items()
    ]
    pool = ThreadPoolExecutor(workers) if workers > 1 else contextlib.nullcontext()
    with pool as executor:
        found = run_cells(
            _File(show), cells, folder=folder, executor=executor, retry=True, code=None
        )
    broken = [outcome.error for outcome in found if outcome.error]
    if broken:
        raise DataError(broken[0].strip().splitlines()[-1].partition(": ")[2])
    seconds = sum(outcome.seconds for outcome in found)
    settings = {"full": full, "only": sorted(only), "seconds": seconds}
    return Report.joined([Report(**outcome.result) for outcome in found], settings)


@dataclass(frozen=True)
class _File:
    """Runs the tests of a file, a cell of the sweep; returns the fields of its report."""

    show: Callable[[str], None]

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "report.json"
            words = [str(Path(cell["root"], cell["file"])), "--rootdir", cell["root"]]
            words += ["--claims", str(path), *(["--claims-full"] if cell["full"] else [])]
            if _run(words, cell["ids"], path, self.show) == _INTERRUPTED:
                raise KeyboardInterrupt
            return json.loads(path.read_text(encoding="utf-8"))


def _code(root: str, file: str) -> str:
    """Return a hash of this package and of what stands beside a file of tests."""
    beside = sorted(Path(root, file).parent.glob("*.py"))
    return digest([path.read_bytes() for path in beside])


def _run(words: list[str], only: Sequence[str], result: Path, show: Callable[[str], None]) -> int:
    """Run pytest and return its status; raise what it said if it wrote no `result`."""
    _require("pytest")
    # The module is named for installations whose entry points are older than it.
    command = [sys.executable, "-m", "pytest", *words, "-p", "metafocus_claims"]
    command += ["-m", "claim", "--verbosity=1", "--tb=short"]
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
    if code == _NONE:
        raise DataError(f"{words[0]} has no test with the marker pytest.mark.claim(...).")
    if not result.exists():
        raise DataError(f"the tests in {words[0]} could not be collected: {_reason(log)}")
    return code


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DataError(f"{package} is not installed: pip install pytest.")


def _reason(log: list[str]) -> str:
    """The last errors that pytest printed, or its last line."""
    lines = list(dict.fromkeys(line for line in log if line))
    errors = [line for line in lines if re.match(r"(ERROR:?|E) ", line)]
    return "; ".join(errors[-3:] or lines[-1:]) or "pytest printed nothing"
