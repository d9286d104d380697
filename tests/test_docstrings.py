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


def part(name: str) -> str:
    """Return the folder or file of the package that a module belongs to."""
    return name.partition(".")[2].partition(".")[0] or name


def load(name: str, missing: list[str]):
    """Return a module; None, and a line in `missing`, if it needs a package that is not here."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "metafocus", "torch"):
            raise
        missing.append(f"{name} needs {package}")


@pytest.mark.parametrize("folder", sorted({part(name) for name in MODULES}))
def test_examples(folder):
    public = {k: getattr(mf, k) for k in mf.__all__}
    finder = doctest.DocTestFinder(exclude_empty=True)
    missing: list[str] = []
    output: list[str] = []
    failed = 0
    for name in MODULES:
        module = load(name, missing) if part(name) == folder else None
        if module is None:
            continue
        # No optional flags: an example prints what it says.
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        for test in finder.find(module, extraglobs={"torch": torch, **public}):
            torch.manual_seed(0)
            failed += runner.run(test, out=output.append).failed
    assert failed == 0, "".join(output)
    if missing:
        pytest.skip("; ".join(missing))


def test_public_things_say_what_they_are_in_one_sentence():
    first = {
        name: (inspect.getdoc(x) or "").split("\n")[0].strip()
        for name in mf.__all__
        # Not the type aliases.
        if (inspect.isclass(x := getattr(mf, name)) or inspect.isfunction(x))
        and getattr(x, "__module__", "").startswith("metafocus")
    }
    assert len(first) > 50
    assert [k for k, v in first.items() if not v.endswith(".") or "dict[str" in v] == []


def test_the_main_verbs_have_examples():
    for name in ("bilevel", "hypergrad", "adapt", "over_tasks", "proximal", "recompute", "Problem"):
        assert ">>>" in (inspect.getdoc(getattr(mf, name)) or ""), name
