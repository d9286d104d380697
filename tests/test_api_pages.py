"""The API pages show every public name, and what they name exists."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import metafocus as mf

DOCS = Path(__file__).parent.parent / "docs" / "api"
SHOWN = sorted(
    name
    for page in DOCS.glob("*.md")
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)
)
PACKAGES = (
    "metafocus",
    "metafocus.adapters",
    "metafocus.attention",
    "metafocus.comparison",
    "metafocus.data",
    "metafocus.diagnostics",
    "metafocus.estimators",
    "metafocus.evals",
    "metafocus.evals.agentic",
    "metafocus.evals.babilong",
    "metafocus.evals.ruler",
    "metafocus.trainer",
    "metafocus.linear",
    "metafocus.lm",
    "metafocus.masks",
    "metafocus.models",
    "metafocus.parallel",
    "metafocus.recipes",
    "metafocus.recipes.fewshot",
    "metafocus.recipes.hpo",
    "metafocus.algorithms",
    "metafocus.autodiff.stores",
    "metafocus.solvers",
)


def resolve(name: str) -> Any:
    home, _, last = name.rpartition(".")
    return getattr(importlib.import_module(home), last)


def public(package: str) -> dict[str, Any]:
    """What a package offers: its `__all__`, or what its `__init__` defines or re-exports."""
    module = importlib.import_module(package)
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__}
    text = Path(module.__file__ or "").read_text()
    if package.count(".") > 1:
        names = re.findall(r"^(?:def|class) ([a-z]\w*)", text, re.M)
    else:
        names = re.findall(r"^from .* import (\w+) as \1$", text, re.M)
    assert names, package
    return {name: getattr(module, name) for name in names}


def test_what_is_shown_exists_where_it_is_defined():
    for name in SHOWN:
        value = resolve(name)
        home = name.rpartition(".")[0]
        # Constants and aliases do not know where they come from.
        if isinstance(value, type | FunctionType):
            assert value.__module__ == home, name
            assert value.__doc__, name


def test_every_public_name_is_shown():
    shown = [resolve(name) for name in SHOWN]
    missing = [
        f"{package}.{name}"
        for package in PACKAGES
        for name, value in public(package).items()
        if not isinstance(value, ModuleType) and not any(value is one for one in shown)
    ]
    assert not missing


def test_public_modules_have_a_page():
    modules = {name for name in mf.__all__ if isinstance(getattr(mf, name), ModuleType)}
    assert modules >= {"algorithms", "attention", "data", "errors", "masks", "params", "recipes"}
    assert modules <= {page.stem for page in DOCS.glob("*.md")}


def test_nothing_is_shown_twice():
    assert len(SHOWN) == len(set(SHOWN))


ROOT = Path(__file__).parent.parent


def code_of_pages_and_examples() -> Iterator[tuple[str, str]]:
    """Every block of Python that a reader may copy, with the file that it stands in."""
    pages = [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for path in pages:
        for block in re.findall(r"```(?:py|python)\b[^\n]*\n(.*?)```", path.read_text(), re.S):
            yield path.name, block
    for path in ROOT.glob("examples/**/*.py"):
        yield path.name, path.read_text()
    for path in [*ROOT.glob("docs/**/*.ipynb"), *ROOT.glob("examples/**/*.ipynb")]:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                yield path.name, "".join(cell["source"])


def imported(code: str) -> Iterator[tuple[str, str]]:
    """Pairs of module and name that a piece of code imports from metafocus."""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a block that shows a part of a file, or a magic of notebooks
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "metafocus":
            yield from ((str(node.module), alias.name) for alias in node.names)


def is_public(module: str, name: str) -> bool:
    """Whether a package offers a name, or an API page shows it or something inside it."""
    offered = getattr(importlib.import_module(module), "__all__", ())
    full = f"{module}.{name}"
    shown = any(x == full or x.startswith(f"{full}.") for x in SHOWN)
    return not any(part.startswith("_") for part in full.split(".")) and (name in offered or shown)


def test_pages_and_examples_import_public_names_alone():
    found = {(f, *x) for f, code in code_of_pages_and_examples() for x in imported(code)}
    assert len(found) > 30
    assert not sorted(x for x in found if not is_public(*x[1:]))
