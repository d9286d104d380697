"""A run of the suite of claims as a page of Markdown."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metafocus.claims.suite import VERDICTS, Reproduction

_MANY = 8
"""More values than this are shown as a range."""

_FEW = 4
"""So many cases are shown one by one."""

_NOT_HERE = """\
## What a small machine cannot show

Not in this suite, because they need data that must be downloaded or other machines: the accuracies
on Omniglot, miniImageNet and CIFAR-10; data reweighting of BERT and RoBERTa; FocuSFT at 7 billion
parameters; test-time training at its published sizes. Where a claim of such a paper stands above,
its note says what the small form of it shows."""


def page(found: Reproduction, command: str) -> str:
    """Return the report: what was run and where, one table of claims, and where each test is.

    Args:
        found: the run.
        command: the command that made it, for the page to name.

    Returns:
        The page.
    """
    rows, at = found.rows, found.environment
    count = collections.Counter(row["verdict"] for row in rows)
    verdicts = [f"{count[v]} {v}" for v in reversed(VERDICTS) if count[v]]
    form = "full" if found.settings.get("full") else "quick"
    again = "".join(
        f"; {', '.join(part['ids'])} again since, in {part['seconds']:.0f} s"
        for part in found.settings.get("again", ())
    )
    where = (
        f"torch {at.get('torch', '?')}, Python {at.get('python', '?')}, {at.get('system', '?')} "
        f"{at.get('machine', '?')}, {at.get('cores', '?')} cores, {at.get('threads', '?')} thread"
        f"{'' if at.get('threads') == 1 else 's'}, {at.get('device', '?')}"
    )
    lines = [
        "# Published claims, reproduced",
        "",
        f"Written by `{command}`, the {form} form of the suite, in "
        f"{found.settings.get('seconds', 0.0):.0f} s{again}; {where}. Every value "
        "below was recorded by the test while it ran; `reproduction.json` beside this page has "
        "them in full, with each test's docstring: the claim, the tolerance and its reason.",
        "",
        f"**{len(rows)} claims: {', '.join(verdicts) or 'none'}.**",
        "",
        "*Reproduced*: the test asserts the claim and passed. *Reported*: measured, not asserted. "
        "*Contradicted*: an assertion failed. *Error*: the test broke before it could tell. "
        "`a to b` are the extremes over the cases of a test or over its values. *Form*: the "
        "full form has the published budgets, the quick one those for minutes on two cores; most "
        "claims are the same in both.",
        "",
        "| | claim | paper | published | measured | form | verdict | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        says = row["says"] + (f" ({row['note']})" if row["note"] else "")
        told = measured(row["measured"]) or "-"
        if row["verdict"] not in ("reproduced", "reported") and row["message"]:
            told += f"; {row['message']}"
        cells = (row["id"], says, row["paper"], row["published"], told)
        end = (f"**{row['verdict']}**" if row["message"] else row["verdict"], _time(row["seconds"]))
        lines.append("| " + " | ".join([*map(_cell, cells), row["form"], *end]) + " |")
    lines += ["", "## Where the tests are", ""]
    places: dict[str, list[str]] = {}
    for row in rows:
        places.setdefault(row["id"], []).append(f"`{row['test']}`")
    lines += [f"- {id}: {', '.join(tests)}" for id, tests in places.items()]
    return "\n".join([*lines, "", _NOT_HERE]) + "\n"


def measured(cases: Mapping[str, Any]) -> str:
    """Return the values of all cases of a test as one line.

    A few cases stand one after another; of many, the values of one name are put together.

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
    """Whether each case has words of its own for its values: they say which case it is."""
    names = [frozenset(name for name, _ in _leaves(value)) for value in values]
    return len(set(names)) == len(names)


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """What is not a dict, under the words that lead to it."""
    if not isinstance(value, Mapping):
        return [(name, value)]
    return [x for key, inner in value.items() for x in _leaves(inner, f"{name} {key}".strip())]


def _several(values: Sequence[Any]) -> str:
    """Different values of one name: a range of numbers, or one after another."""
    if all(_number(v) for v in values):
        return f"{_one(min(values))} to {_one(max(values))}"
    lists = [v if isinstance(v, list) else [v] for v in values]
    if all(_number(x) for v in lists for x in v):
        return _several([x for v in lists for x in v])
    return "; ".join(_one(v) for v in values)


def _one(value: Any) -> str:
    if isinstance(value, list):
        if len(value) > _MANY and all(_number(x) for x in value):
            return _several(value)
        if any(isinstance(x, list) for x in value):
            return " / ".join(_one(x) for x in value)
        return ", ".join(_one(x) for x in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _time(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"


def _cell(text: str) -> str:
    for sign in "\\|*_<":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
