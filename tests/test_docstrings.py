"""The examples in the docstrings run, and public things have docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import metafocus as mf

MODULES = [
    "metafocus",
    *sorted(
        m.name
        for m in pkgutil.walk_packages(mf.__path__, "metafocus.")
        if not m.name.endswith("__main__")
    ),
]


def load(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "metafocus", "torch"):
            raise
        pytest.skip(f"{name} needs {missing}")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = load(name)
    public = {k: getattr(mf, k) for k in mf.__all__}
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    # No optional flags: an example prints what it says.
    for test in finder.find(module, extraglobs={"torch": torch, **public}):
        output: list[str] = []
        result = runner.run(test, out=output.append)
        assert result.failed == 0, "".join(output)


# Not the type aliases.
ENGINE_NAMES = [
    n
    for n in mf.__all__
    if (inspect.isclass(x := getattr(mf, n)) or inspect.isfunction(x))
    and getattr(x, "__module__", "").startswith("metafocus")
]


@pytest.mark.parametrize("name", ENGINE_NAMES)
def test_public_things_say_what_they_are(name):
    text = inspect.getdoc(getattr(mf, name)) or ""
    first = text.split("\n")[0]
    assert first.strip().endswith("."), f"{name}: the first line is one sentence"
    assert "dict[str" not in first


def test_the_main_verbs_have_examples():
    for name in ("bilevel", "hypergrad", "adapt", "over_tasks", "proximal", "recompute", "Problem"):
        assert ">>>" in (inspect.getdoc(getattr(mf, name)) or ""), name
