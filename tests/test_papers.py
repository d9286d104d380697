"""The paper index: every name and every test in it exists, and no method is missing from it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import metafocus as mf

ROOT = Path(__file__).parent.parent
ROWS = [
    line
    for line in (ROOT / "docs" / "papers.md").read_text().splitlines()
    if line.startswith("| ") and "`" in line
]


def resolve(name: str) -> Any:
    """The object of a dotted name; `mf` is `metafocus`."""
    first, *rest = name.split(".")
    found = importlib.import_module("metafocus" if first == "mf" else first)
    for part in rest:
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def names(row: str) -> list[str]:
    return re.findall(r"`((?:mf|metafocus)\.[\w.]+)`", row)


def defined_in(file: str) -> set[str]:
    body = ast.parse((ROOT / "tests" / file).read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_a_row_names_code_and_a_test_that_exist(row):
    _, _, paper, code, tests, _ = row.split("|")
    assert names(code) and paper.strip()
    for name in names(code):
        assert callable(resolve(name)), name
    file, found = None, 0
    for word in re.findall(r"`([^`]+)`", tests):
        if word.endswith(".py"):
            file = word
        else:
            assert file is not None and word in defined_in(file), f"{file}: {word}"
            found += 1
    assert found


def test_no_method_is_missing():
    """Estimators, linear solvers, inner solvers, single loops, recipes, products, masks."""
    shown = {id(resolve(name)) for row in ROWS for name in names(row)}
    homes = ("estimators", "linear", "solvers", "hvp")
    methods = {
        f"mf.{name}": value
        for name in mf.__all__
        if callable(value := getattr(mf, name))
        and any(part in getattr(value, "__module__", "").split(".") for part in homes)
        and (name[0].isupper() or name.startswith(("adjoint", "hvp")))
    }
    for module in (mf.recipes.fewshot, mf.recipes.hpo):
        methods |= {
            f"{module.__name__}.{name}": value
            for name, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and value.__annotations__.get("return") == "Problem"
        }
    methods["mf.Given"] = mf.Given
    methods |= {
        f"mf.algorithms.{name}": value
        for name in mf.algorithms.__all__
        # States have no init.
        if inspect.isclass(value := getattr(mf.algorithms, name)) and hasattr(value, "init")
    }
    methods |= {f"mf.recipes.{n}": getattr(mf.recipes, n) for n in ("focusft", "qttt", "ttt_e2e")}
    assert len(methods) > 35
    assert not [name for name, value in methods.items() if id(value) not in shown]


def test_identifiers_lead_to_their_own_pages():
    for shown, target in re.findall(r"\[(\d{4}\.\d{5})\]\(([^)]*)\)", "\n".join(ROWS)):
        assert target == f"https://arxiv.org/abs/{shown}"
