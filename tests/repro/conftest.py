"""Claims in machine-readable form: what a test reproduces, and what it measured when it ran.

    @pytest.mark.claim("T6", paper="arXiv 2301.10945", says="the bias is O(1 / strength)",
                       published="slope -1")
    def test_t6(claim):
        slope = ...
        claim(slope)                        # or claim({"slope": slope, "at 100": 0.009})
        assert abs(slope + 1) < 0.05

The value is recorded before the assertion, so that a claim that fails has its number too. With
`--claims FILE` each claim and each phase of each test is appended to FILE as a line of JSON, as it
happens: a crash leaves what came before. `metafocus reproduce` makes its report from these lines.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from metafocus.comparison.report import environment

HERE = Path(__file__).parent
KEYS = {"paper", "says", "published", "note", "asserted"}
STATED = pytest.StashKey[dict[str, dict[str, Any]]]()
PASSED = pytest.StashKey[bool]()


def pytest_addoption(parser):
    group = parser.getgroup("metafocus")
    group.addoption("--claims", metavar="FILE", help="append what claims measure to FILE")
    group.addoption("--only-claims", metavar="IDS", help="run these claims only: T1,T12")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "claim(id, *, paper, says, published, note, asserted): a published claim"
    )


def claims_of(item) -> list[dict[str, Any]]:
    """The claims that an item's markers state, in the order in which they are written."""
    found = []
    for mark in reversed(list(item.iter_markers("claim"))):
        unknown = set(mark.kwargs) - KEYS
        missing = {"paper", "says", "published"} - set(mark.kwargs)
        if len(mark.args) != 1 or unknown or missing:
            raise pytest.UsageError(
                f"{item.nodeid}: claim(id, *, paper, says, published, note, asserted); "
                f"unknown: {sorted(unknown)}, missing: {sorted(missing)}"
            )
        found.append({"id": mark.args[0], "note": "", "asserted": True, **mark.kwargs})
    return found


def plain(value: Any) -> Any:
    """Turn tensors, tuples and dicts of them into what JSON knows."""
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON knows no NaN
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a measured value is numbers, words, lists and dicts, not {type(value)}")


@pytest.fixture(autouse=True)
def claim(request):
    """`claim(measured)` or `claim(measured, id="T9")` where a test states several claims."""
    stated = {c["id"]: c for c in claims_of(request.node)}

    def record(measured: Any, *, id: str | None = None) -> None:
        if not stated:
            raise pytest.UsageError(f"{request.node.nodeid}: mark it with pytest.mark.claim")
        if id is None and len(stated) > 1:
            raise pytest.UsageError(f"which of the claims {list(stated)}? Give id=")
        mine = stated[id or next(iter(stated))]
        mine["measured"] = plain(measured)

    request.node.stash[STATED] = stated
    yield record
    silent = [c["id"] for c in stated.values() if "measured" not in c]
    if silent and request.node.stash.get(PASSED, False):
        pytest.fail(f"passed without a measured value: {silent}", pytrace=False)


# --- selection -----------------------------------------------------------------------------------


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("only_claims", None)
    if not wanted:
        return
    wanted = {w.strip() for w in wanted.split(",")}
    mine = [i for i in items if HERE in i.path.parents]
    known = {c["id"] for i in mine for c in claims_of(i)}
    if wanted - known:
        raise pytest.UsageError(f"unknown claims {sorted(wanted - known)}; known: {sorted(known)}")
    keep = [i for i in mine if wanted & {c["id"] for c in claims_of(i)}]
    config.hook.pytest_deselected(items=[i for i in items if i not in keep])
    items[:] = keep


# --- the record ----------------------------------------------------------------------------------


def append(config, line: dict[str, Any]) -> None:
    if path := config.getoption("claims", None):
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_collection_finish(session):
    # With pytest-xdist the controller collects nothing and every worker the same.
    if getattr(session.config, "workerinput", {}).get("workerid", "gw0") != "gw0":
        return
    # Of the process that runs the tests: the number of threads is set by tests/conftest.py.
    append(session.config, {"environment": environment(torch.float64)})
    for item in session.items:
        if HERE in item.path.parents:
            line = {"collected": item.nodeid, "claims": claims_of(item)}
            line["docstring"] = inspect.getdoc(item.function) or ""
            append(session.config, line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    line = {"test": item.nodeid, "when": report.when, "seconds": report.duration}
    line["outcome"] = report.outcome
    if report.when == "call":
        item.stash[PASSED] = report.passed
        line["claims"] = list(item.stash.get(STATED, {}).values())
    if report.skipped:
        line["message"] = str(call.excinfo.value)
    elif report.failed:
        asserted = any(c["asserted"] for c in claims_of(item))
        broken = isinstance(call.excinfo.value, AssertionError | pytest.fail.Exception)
        # What fails outside a test that asserts its claim is no finding about the claim.
        found = broken and asserted and report.when == "call"
        line["outcome"] = "contradicted" if found else "error"
        line["message"] = call.excinfo.exconly().splitlines()[0]
    append(item.config, line)
    return report
