"""The pairs of a migration page: what a user of another library writes, and what one writes here.

A page has a `## Setup` with a ```python block for both sides, and perhaps a ```py block for theirs;
then `## <idiom>` sections, each with a ```py block in the other library that leaves `theirs`, and a
```python block that leaves `ours`: tensors or nested collections of them. All are taken from the
page and run in the same names.

METAFOCUS_RIVALS: where other libraries are, beside those that are installed: virtual environments
(of this Python version) and clones, separated by colons. They come last on the path, so torch and
numpy stay those of this environment, and only while a library is imported: what else lies there
(a torchvision of another torch) is not found by anybody later.
"""

from __future__ import annotations

import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import metafocus as mf

PAGES = Path(__file__).parents[2] / "docs" / "migration"
_BLOCK = re.compile(r"^```(py|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def folders() -> list[str]:
    """The folders that METAFOCUS_RIVALS names, with the site-packages of environments."""
    found: list[str] = []
    for word in filter(None, os.environ.get("METAFOCUS_RIVALS", "").split(os.pathsep)):
        packages = sorted(Path(word).glob("lib/python*/site-packages"))
        found += [str(p) for p in packages] or [word]
    return found


def rival(name: str, *submodules: str) -> None:
    """Skip the module unless a library can be imported.

    Args:
        name: of the package.
        submodules: import these without the package's own `__init__`, which wants more than the
            environment has.
    """
    before = list(sys.path)
    sys.path += [f for f in folders() if f not in sys.path]
    try:
        for module in submodules:
            _bare(name, module.rpartition(".")[0])
        for module in submodules or (name,):
            pytest.importorskip(module, exc_type=ImportError)
    finally:
        sys.path[:] = before


def _bare(name: str, package: str) -> None:
    """Put a package and the one around it into `sys.modules` without running their `__init__`."""
    roots = [Path(root) / name for root in sys.path if (Path(root) / name).is_dir()]
    if not roots:
        pytest.skip(f"{name} is not here", allow_module_level=True)
    for dotted in (name, package):
        if dotted not in sys.modules:
            module = types.ModuleType(dotted)
            module.__path__ = [str(roots[0].joinpath(*dotted.split(".")[1:]))]
            sys.modules[dotted] = module


def sections(page: str) -> dict[str, list[tuple[str, str]]]:
    """The blocks of each `## ` section that has any, as (language, code)."""
    text = (PAGES / f"{page}.md").read_text()
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        blocks = _BLOCK.findall(part)
        if blocks:
            found[part.splitlines()[0].strip()] = blocks
    return found


def idioms(page: str) -> list[str]:
    """The titles of the pairs."""
    return [title for title in sections(page) if title != "Setup"]


def first_cells(page: str) -> list[str]:
    """The first column of the page's first table, without its head."""
    table = (PAGES / f"{page}.md").read_text().partition("\n|")[2].partition("\n\n")[0]
    return [line.split("|")[-3].strip() for line in table.splitlines()[2:]]


def setup(page: str, **names: Any) -> dict[str, Any]:
    """The names that both sides of a page's pairs share."""
    space = {"torch": torch, "mf": mf, "__name__": page, **names}
    for _, code in sections(page).get("Setup", []):
        _run(page, code, space)
    return space


def check(page: str, title: str, rtol: float = 1e-9, **names: Any) -> None:
    """Run a pair and compare; both sides do the same arithmetic in float64, in another order."""
    found, space = sections(page), setup(page, **names)
    kinds = [kind for kind, _ in found[title]]
    assert kinds == ["py", "python"], f"{page}, {title}: {kinds}"
    for _, code in found[title]:
        _run(page, code, space)
    theirs, ours = (_flat(space[key]) for key in ("theirs", "ours"))
    assert theirs.dtype == ours.dtype == torch.float64
    assert theirs.norm() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


def _run(page: str, code: str, space: dict[str, Any]) -> None:
    exec(compile(code, f"docs/migration/{page}.md", "exec"), space)


def _flat(value: Any) -> torch.Tensor:
    leaves = torch.utils._pytree.tree_leaves(value)
    return torch.cat([leaf.detach().reshape(-1) for leaf in leaves])
