"""A report of claims as a page of Markdown."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metafocus.checks import is_number
from metafocus.claims.report import VERDICTS, Report

_MANY = 8
"""More values than this number are shown as a range."""

_FEW = 4
"""Up to this number, cases are listed one by one."""

_LEGEND = """\
Each value was recorded by a test while it ran. *Reproduced*: the test asserts the claim and passed.
*Reported*: the value is measured and nothing is asserted. *Contradicted*: an assertion failed.
*Error*: the test broke before it could tell. *Full* tests have the published budgets, *quick* ones
smaller budgets; a test that has one budget is the same in both forms. `a to b` are the extremes
over the cases of a test or over its values."""


def findings(report: Report) -> str:
    """Return what the run found, in one paragraph.

    Example:
        >>> row = {"id": "T1", "says": "it falls", "verdict": "contradicted"}
        >>> findings(Report([row, {**row, "id": "T2", "verdict": "reproduced"}]))
        '2 claims: 1 reproduced, 1 contradicted. Contradicted: T1 (it falls).'
    """
    count = collections.Counter(row["verdict"] for row in report.rows)
    verdicts = ", ".join(f"{count[v]} {v}" for v in reversed(VERDICTS) if count[v])
    number = f"{len(report.rows)} claim{'' if len(report.rows) == 1 else 's'}"
    parts = [f"{number}: {verdicts or 'none was run'}."]
    for verdict, head in (("contradicted", "Contradicted"), ("error", "The test broke")):
        names = [f"{r['id']} ({r['says']})" for r in report.rows if r["verdict"] == verdict]
        parts += [f"{head}: {'; '.join(names)}."] if names else []
    if report.rows and not count["contradicted"]:
        parts.append("No claim is contradicted.")
    return " ".join(parts)


def page(report: Report, name: str, picture: str = "") -> str:
    """Return the report as a page: findings, one table of claims, and where each test is.

    Args:
        report: the run.
        name: the file that has the report as JSON, for the page to mention.
        picture: a picture to show after the findings.

    Returns:
        The page.
    """
    lines = [
        "# Published claims, run as tests",
        "",
        f"**{_cell(findings(report))}**",
        "",
        *([f"![Two of the claims as pictures]({picture})", ""] if picture else []),
        "| | claim | published | measured | verdict | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        says = row["says"] + (f" ({row['note']})" if row["note"] else "")
        value = measured(row["measured"]) or "-"
        if row["verdict"] not in ("reproduced", "reported") and row["message"]:
            value += f"; {row['message']}"
        cells = [row["id"], f"{says}. {row['paper']}", row["published"], value]
        verdict = f"**{row['verdict']}**" if row["message"] else row["verdict"]
        cells = [*map(_cell, cells), f"{verdict}, {row['form']}", _time(row["seconds"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## How to read the table", "", _LEGEND, "", _provenance(report, name), ""]
    lines += ["## Where the tests are", ""]
    places: dict[str, list[str]] = {}
    for row in report.rows:
        places.setdefault(row["id"], []).append(f"`{row['test']}`")
    lines += [f"- {_cell(id)}: {', '.join(tests)}" for id, tests in places.items()]
    return "\n".join(lines) + "\n"


def _provenance(report: Report, name: str) -> str:
    """Which command wrote the report, where, and how long it took."""
    settings, at = report.settings, report.environment
    again = "".join(
        f" {', '.join(part['ids'])} ran again later, in {part['seconds']:.0f} s."
        for part in settings.get("again", ())
    )
    threads = at.get("threads", "?")
    where = (
        f"torch {at.get('torch', '?')}, Python {at.get('python', '?')}, {at.get('system', '?')} "
        f"{at.get('machine', '?')}, {at.get('cores', '?')} cores, {threads} "
        f"thread{'' if threads == 1 else 's'}, {at.get('device', '?')}"
    )
    return (
        f"The page was written by `{settings.get('command', '?')}` in "
        f"{settings.get('seconds', 0.0):.0f} s.{again} Machine: {where}. The file `{name}` beside "
        "this page has every value in full, and the docstring of each test."
    )


def measured(cases: Mapping[str, Any]) -> str:
    """Return the values of all cases of a test as one line.

    A few cases are listed one by one; of many, the values of one name are put together.

    Example:
        >>> measured({"": {"slope": -1.0123, "error": [0.1, 0.01]}})
        'slope -1.01; error 0.1, 0.01'
        >>> measured({"sgd": 1e-9, "adam": 3e-9})
        'sgd: 1e-09; adam: 3e-09'
        >>> measured({str(i): i for i in range(30)})
        '0 to 29 (30 cases)'
    """
    if 1 < len(cases) <= _FEW and not _names_differ(cases.values()):
        return "; ".join(f"{case}: {measured({'': value})}" for case, value in cases.items())
    gathered: dict[str, list[Any]] = {}
    for value in cases.values():
        for name, leaf in _leaves(value):
            gathered.setdefault(name, []).append(leaf)
    parts = []
    for name, values in gathered.items():
        text = _one(values[0]) if all(v == values[0] for v in values) else _several(values)
        if len(values) > 1:
            text += f" ({len(values)} cases)"
        parts.append(f"{name} {text}".strip())
    return "; ".join(parts)


def _names_differ(values: Iterable[Any]) -> bool:
    """Whether the names of the values already say which case they belong to."""
    names = [frozenset(name for name, _ in _leaves(value)) for value in values]
    return len(set(names)) == len(names)


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """The values in nested dicts, each with the keys that lead to it as its name."""
    if not isinstance(value, Mapping):
        return [(name, value)]
    return [x for key, inner in value.items() for x in _leaves(inner, f"{name} {key}".strip())]


def _several(values: Sequence[Any]) -> str:
    """Return different values of one name as a range, or as a list where they are no numbers."""
    if all(is_number(v) for v in values):
        return f"{_one(min(values))} to {_one(max(values))}"
    lists = [v if isinstance(v, list) else [v] for v in values]
    if all(is_number(x) for v in lists for x in v):
        return _several([x for v in lists for x in v])
    return "; ".join(_one(v) for v in values)


def _one(value: Any) -> str:
    if isinstance(value, list):
        if len(value) > _MANY and all(is_number(x) for x in value):
            return _several(value)
        if any(isinstance(x, list) for x in value):
            return " / ".join(_one(x) for x in value)
        return ", ".join(_one(x) for x in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _time(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"


def _cell(text: str) -> str:
    for sign in "\\|*_":
        text = text.replace(sign, f"\\{sign}")
    # Not every reader of Markdown knows "\<".
    return " ".join(text.replace("<", "&lt;").split())
