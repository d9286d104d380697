"""One check for each kind of argument; no other file asks whether a value is a bool."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch

from metafocus import checks, precision
from metafocus.errors import ProblemError

ROOT = Path(__file__).parent.parent / "metafocus"
FILES = sorted(ROOT.rglob("*.py"))

OTHER_TYPES = {
    "problem.py": "a metric may be a truth value",
    "graph.py": "a constant of an episode may be a truth value",
    "estimators/unrolled.py": "recompute is True, False or a number",
    "algorithms/windows.py": "recompute is True, False or a number",
    "data/messages.py": "train is true or false, and 1 is a weight",
    "data/lost_texts.py": "numbers are rendered, truth values are not",
    "claims/page.py": "a truth value is printed as a word",
    "claims/marker.py": "whether a claim is asserted is a truth value, and so may a figure be",
}
"""Files in which a bool is a value of its own, not a wrong integer."""


@pytest.mark.parametrize("bad", [True, False, 1.0, "1", None, 0, -1])
def test_whole(bad):
    with pytest.raises(ValueError, match=r"n must be an integer >= 1, got"):
        checks.whole("n", bad, 1)


def test_whole_says_what_it_is_told_and_raises_what_it_is_told():
    with pytest.raises(ProblemError, match=r"n must be an integer >= 0 \(a note\), got -1"):
        checks.whole("n", -1, note=" (a note)", error=ProblemError)
    checks.whole("n", 0)


@pytest.mark.parametrize("bad", [True, "1", None, math.nan, math.inf])
def test_number(bad):
    with pytest.raises(ValueError, match="x must be a finite number, got"):
        checks.number("x", bad)
    checks.number("x", -1)


def test_signs():
    for bad in (0, -1, math.nan):
        with pytest.raises(ValueError, match="x must be positive"):
            checks.positive("x", bad)
    for bad in (-1, math.nan):
        with pytest.raises(ValueError, match="x must be >= 0"):
            checks.not_negative("x", bad)
    for check in (checks.positive, checks.not_negative):
        with pytest.raises(ValueError, match="x must be finite, got inf"):
            check("x", math.inf)
    for bad in (1, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"x must be in \[0, 1\)"):
            checks.fraction("x", bad)


def asks_for_a_bool(tree: ast.Module) -> bool:
    """Whether `isinstance(x, ...)` with `bool` in it stands anywhere in a file."""
    return any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and "bool" in ast.unparse(node.args[1]).replace(" ", "").split("|")
        for node in ast.walk(tree)
    )


def test_no_other_file_asks_whether_a_number_is_a_bool():
    found = {
        str(path.relative_to(ROOT))
        for path in FILES
        if asks_for_a_bool(ast.parse(path.read_text()))
    }
    assert found == {"checks.py", *OTHER_TYPES}


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.int64),
        (torch.bool, torch.bool),
    ],
)
def test_half_types_become_float32_and_no_other(dtype, expected):
    x = torch.ones(2, dtype=dtype)
    assert precision.wide(x).dtype == expected
    assert (precision.wide(x) is x) == (dtype == expected)
