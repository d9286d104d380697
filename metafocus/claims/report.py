"""The report of a run: one row for each claim of each test, made of what the tests recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metafocus.errors import DataError
from metafocus.files import write_json, write_whole

VERDICTS = ("contradicted", "error", "skipped", "reported", "reproduced")
"""The worst comes first: a test with several cases has the worst verdict of them."""

NEVER_ENDED = "the run ended before this test did"


@dataclass
class Case:
    """A test with one set of parameters, and what is known of it so far.

    Attributes:
        test: the name of the test, as pytest takes it, without parameters.
        case: the parameters; the empty string where there are none.
        docstring: of the test.
        claims: what its markers state.
        verdict: the worst of the phases that have ended.
        message: why the claim is not reproduced.
        seconds: of all phases.
        measured: values by the id of the claim.
        ended: whether the test came to its end; the teardown is the last phase.
    """

    test: str
    case: str
    docstring: str
    claims: list[dict[str, Any]]
    verdict: str = VERDICTS[-1]
    message: str = ""
    seconds: float = 0.0
    measured: dict[str, Any] = field(default_factory=dict)
    ended: bool = False

    def add(self, verdict: str, message: str, seconds: float, measured: dict[str, Any]) -> None:
        """Add a phase: setup, call or teardown."""
        self.verdict = _worst(self.verdict, verdict)
        self.message = self.message or message
        self.seconds += seconds
        self.measured |= measured


def rows(cases: Iterable[Case], form: str) -> list[dict[str, Any]]:
    """Return a row for each claim of each test, over its cases, ordered by the claim's id."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for case in cases:
        verdict, message = case.verdict, case.message
        if not case.ended:
            verdict, message = "error", message or NEVER_ENDED
        for claim in case.claims:
            start = {"measured": {}, "verdict": VERDICTS[-1], "seconds": 0.0, "message": ""}
            start |= {"test": case.test, "docstring": case.docstring, "form": form}
            row = found.setdefault((claim["id"], case.test), {**claim, **start})
            reported = verdict == "reproduced" and not claim["asserted"]
            row["verdict"] = _worst(row["verdict"], "reported" if reported else verdict)
            row["seconds"] += case.seconds
            row["message"] = row["message"] or message
            if claim["id"] in case.measured:
                row["measured"][case.case] = case.measured[claim["id"]]
    return sorted(found.values(), key=_order)


def _worst(*verdicts: str) -> str:
    return min(verdicts, key=VERDICTS.index)


def _order(row: dict[str, Any]) -> tuple[bool, str, int, str]:
    """T2 before T10, ids without a number after them."""
    number = re.fullmatch(r"(\D*)(\d+)", row["id"])
    word, count = (number[1], int(number[2])) if number else (row["id"], 0)
    return (number is None, word, count, row["test"])


@dataclass(frozen=True)
class Report:
    """What a run of claims found.

    Attributes:
        rows: a dict for each claim of each test: `id`, `paper`, `says`, `published`, `note`,
            `asserted`, `measured` (case -> value; the case of a test without parameters is the
            empty string), `verdict`, `seconds`, `message` (why it is not reproduced), `test`,
            `docstring`, and `form`: "full" or "quick".
        environment: versions and machine of the process that ran the tests.
        settings: `command`, `full`, `only`, and the `seconds` of the whole run; `again`: the ids
            and seconds of claims that were run again since.
    """

    rows: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether no claim was contradicted and no test broke."""
        return not {row["verdict"] for row in self.rows} & {"contradicted", "error"}

    def over(self, before: Report) -> Report:
        """Return an earlier report with the rows of the claims that this run repeated.

        Raises:
            DataError: if the two ran with different versions or on different machines.
        """
        if self.environment != before.environment:
            raise DataError(
                f"the report was written with {before.environment}, this run with "
                f"{self.environment}: one report cannot have rows of both. Run all claims anew."
            )
        ids = list(dict.fromkeys(row["id"] for row in self.rows))
        kept = [row for row in before.rows if row["id"] not in ids]
        again = {"ids": ids, "seconds": self.settings["seconds"]}
        settings = {**before.settings, "again": [*before.settings.get("again", []), again]}
        return Report(sorted(kept + self.rows, key=_order), self.environment, settings)

    @classmethod
    def joined(cls, parts: Iterable[Report], settings: dict[str, Any]) -> Report:
        """Return one report of several that ran on one machine, with settings of its own."""
        parts = list(parts)
        found = [row for part in parts for row in part.rows]
        return cls(sorted(found, key=_order), parts[0].environment, settings)

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """Read what `write` wrote.

        Raises:
            DataError: if there is no such file, or it is something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(found["rows"], found["environment"], found["settings"])
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise DataError(f"{path} is not a report of claims: {cause!r}") from cause

    def write(self, path: str | Path) -> None:
        """Write the report as JSON, and a Markdown page of the same name beside it.

        The page shows `figures/NAME.svg` in the same directory, if there is one.
        """
        from metafocus.claims.page import page

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = ("environment", "settings", "rows")
        write_json(path, {name: getattr(self, name) for name in parts})
        picture = f"figures/{path.stem}.svg"
        shown = picture if (path.parent / picture).is_file() else ""
        write_whole(path.with_suffix(".md"), page(self, path.name, shown))
