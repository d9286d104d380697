"""Published claims, run as tests: one row for each, of what was measured.

The suite is `tests/repro` of a checkout. Each test states its claim in a marker and records what it
measures while it runs; rows are made of these records, whether the tests passed, failed or never
came to an end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metafocus.errors import DataError

VERDICTS = ("contradicted", "error", "skipped", "reported", "reproduced")
"""From the worst: a test of several cases has the worst verdict of them."""

_ENDED = "the process ended before this test did"


@dataclass(frozen=True)
class Reproduction:
    """What a run of the suite found.

    Attributes:
        rows: a dict for each claim of each test: `id`, `paper`, `says`, `published`, `note`,
            `measured` (case -> value; the case of a test without parameters is the empty word),
            `verdict`, `seconds`, `message` (why it is not reproduced), `test`, `docstring`, and
            `form`: "full" or "quick".
        environment: versions and machine of the process that ran the tests.
        settings: `full`, `only`, and the `seconds` of the whole run; `again`: the ids and seconds
            of claims that were run again since.
    """

    rows: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether no claim was contradicted and no test broke."""
        return not {row["verdict"] for row in self.rows} & {"contradicted", "error"}

    def over(self, before: Reproduction) -> Reproduction:
        """Return an earlier run with the rows of the claims that this one ran again.

        Raises:
            DataError: If the two ran with different versions or on different machines.
        """
        if self.environment != before.environment:
            raise DataError(
                f"the report was written with {before.environment}, this run with "
                f"{self.environment}: rows of both cannot stand in one report. Run all claims anew."
            )
        ids = sorted({row["id"] for row in self.rows}, key=_order)
        rows = [row for row in before.rows if row["id"] not in ids] + self.rows
        again = {"ids": ids, "seconds": self.settings.get("seconds", 0.0)}
        settings = {**before.settings, "again": [*before.settings.get("again", []), again]}
        rows.sort(key=lambda row: (_order(row["id"]), row["test"]))
        return Reproduction(rows, self.environment, settings)

    @classmethod
    def from_json(cls, path: str | Path) -> Reproduction:
        """Read what `to_json` wrote.

        Raises:
            DataError: If there is no such file, or it is something else.
        """
        try:
            told = json.loads(Path(path).read_text())
            return cls(told["rows"], told["environment"], told["settings"])
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise DataError(f"{path} is no report of `metafocus reproduce`: {cause!r}") from cause

    def to_json(self, path: str | Path) -> None:
        """Write everything as JSON."""
        text = {
            "environment": self.environment,
            "settings": self.settings,
            "rows": self.rows,
        }
        Path(path).write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n")


def find_suite(path: str | Path | None = None) -> Path:
    """Return the folder of the suite: `path`, or `tests/repro` beside this package.

    Raises:
        DataError: If there is none, as in an installation from a wheel.
    """
    place = Path(path) if path else Path(__file__).parent.parent / "tests" / "repro"
    if (place / "conftest.py").is_file():
        return place.resolve()
    if path:
        raise DataError(
            f"--suite {place} holds no suite of claims (a conftest.py and tests); give the folder "
            "tests/repro of a clone of the repository."
        )
    raise DataError(
        "the suite of claims is not part of an installed package: clone the repository, then run "
        "`metafocus reproduce` in it, or `metafocus reproduce --suite CLONE/tests/repro`."
    )


def reproduce(
    suite: str | Path | None = None,
    *,
    full: bool = False,
    only: Sequence[str] = (),
    workers: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> Reproduction:
    """Run the suite in a process of its own, and return what it found.

    Args:
        suite: the folder of the suite; see `find_suite`.
        full: the published budgets instead of those for minutes on two cores.
        only: ids of the claims to run; empty: all.
        workers: processes at once; more than one needs pytest-xdist.
        progress: is called with a line when a test ends.

    Returns:
        The rows, ordered by id.

    Raises:
        DataError: If there is no suite or no pytest, or the suite cannot be collected.
    """
    folder = find_suite(suite)
    for name in ("pytest", *(["xdist"] if workers > 1 else [])):
        if importlib.util.find_spec(name) is None:
            raise DataError(f"{name} is not installed: pip install 'metafocus[dev]'.")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        record, log = Path(scratch) / "record.jsonl", Path(scratch) / "log.txt"
        command = [sys.executable, "-m", "pytest", str(folder), "--claims", str(record)]
        command += ["-p", "no:cacheprovider", "--tb=short"]
        if only:
            command += ["--only-claims", ",".join(only)]
        if workers > 1:
            # One process for each file: what its tests share is trained once.
            command += ["-n", str(workers), "--dist", "loadfile"]
        record.touch()
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=_environment(full), stdout=output, stderr=output
            )
            try:
                _follow(process, record, progress)
            finally:
                process.kill()
                process.wait()
        lines = _lines(record)
        tested = any("when" in line for line in lines)
        # Of these codes pytest says itself that it could not begin.
        if not tested and process.returncode in (2, 3, 4, 5):
            raise DataError(f"the suite could not be collected: {_reason(log.read_text())}")
        rows = _rows(lines, process.returncode, "full" if full else "quick")
    settings = {"full": full, "only": list(only), "seconds": time.perf_counter() - begun}
    at = next((line["environment"] for line in lines if "environment" in line), {})
    return Reproduction(rows, at, settings)


def _environment(full: bool) -> dict[str, str]:
    # The package that runs this is the one that is tested, wherever the suite lies.
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "METAFOCUS_REPRO": "full" if full else "quick",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def _lines(record: Path) -> list[dict[str, Any]]:
    """The lines that are whole: a process that is killed may leave half of one."""
    text = record.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _follow(process: subprocess.Popen[Any], record: Path, progress: Callable[[str], None]) -> None:
    """Tell of each test that ends, until the process does."""
    told, running = 0, True
    while running:
        running = process.poll() is None
        lines = _lines(record)
        total = sum("collected" in line for line in lines)
        ended = [line for line in lines if line.get("when") == "teardown"]
        for number, line in enumerate(ended[told:], start=told + 1):
            mine = [other for other in lines if other.get("test") == line["test"]]
            verdict = min((_verdict(other) for other in mine), key=VERDICTS.index)
            seconds = sum(other["seconds"] for other in mine)
            name = line["test"].rpartition("/")[2]
            progress(f"[{number:3d}/{total}] {verdict:<12} {seconds:7.1f} s  {name}")
        told = len(ended)
        if running:
            time.sleep(0.2)


def _verdict(line: dict[str, Any]) -> str:
    return "reproduced" if line["outcome"] == "passed" else line["outcome"]


def _reason(log: str) -> str:
    """The last errors that pytest wrote, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR:?|E) ", line)]
    return "; ".join(errors[-3:] or lines[-1:]) or "pytest said nothing"


def _rows(lines: list[dict[str, Any]], code: int, form: str) -> list[dict[str, Any]]:
    """One row for each claim of each test function, over its cases and their phases."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for item in (line for line in lines if "collected" in line):
        name, _, case = item["collected"].partition("[")
        phases = [line for line in lines if line.get("test") == item["collected"]]
        found = {c["id"]: c for line in phases for c in line.get("claims", ())}
        verdict = min((_verdict(line) for line in phases), key=VERDICTS.index, default="error")
        message = next((line["message"] for line in phases if "message" in line), "")
        if not any(line["when"] == "teardown" for line in phases):
            verdict, message = "error", f"{_ENDED} (exit code {code})"
        for claim in item["claims"]:
            row = rows.setdefault(
                (claim["id"], name),
                {**claim, "measured": {}, "verdict": "reproduced", "seconds": 0.0, "message": ""},
            )
            reported = verdict == "reproduced" and not claim["asserted"]
            both = (row["verdict"], "reported" if reported else verdict)
            row["verdict"] = min(both, key=VERDICTS.index)
            row["seconds"] += sum(line["seconds"] for line in phases)
            row["message"] = row["message"] or message
            row |= {"test": name.rpartition("/")[2], "docstring": item["docstring"], "form": form}
            if "measured" in found.get(claim["id"], {}):
                row["measured"][case.rstrip("]")] = found[claim["id"]]["measured"]
    return sorted(rows.values(), key=lambda row: (_order(row["id"]), row["test"]))


def _order(id: str) -> tuple[bool, int, str]:
    """T2 before T10, words after them."""
    number = re.fullmatch(r"T(\d+)", id)
    return (number is None, int(number[1]) if number else 0, id)
