"""What code reads by name, and whether the code belongs to an installed package."""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import types
from pathlib import Path

import torch

_SITES = ("/site-packages/", "/dist-packages/")
_INSTALLED = (
    *(sysconfig.get_paths()[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")),
    # Where torch is are others too, as after `pip install --target`.
    str(Path(torch.__file__).parents[1]),
)


@functools.lru_cache(maxsize=1024)
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals that code reads, that of functions inside it too."""
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    names = dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname in loads)
    for inner in _inside(code):
        names |= dict.fromkeys(global_names(inner))
    return tuple(names)


@functools.lru_cache(maxsize=1024)
def attribute_names(code: types.CodeType) -> frozenset[str]:
    """Return the names of attributes that code may read, that of functions inside it too.

    A text counts too: `getattr` may be given it.
    """
    texts = {constant for constant in code.co_consts if isinstance(constant, str)}
    return frozenset(code.co_names).union(texts, *map(attribute_names, _inside(code)))


def _inside(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def is_own_package(module: str | None) -> bool:
    """Return whether a module belongs to this package."""
    return (module or "").partition(".")[0] == "metafocus"


def is_installed(module: str | None, file: str | None = None) -> bool:
    """Return whether a module belongs to Python or to an installed package other than this one.

    Args:
        module: its name.
        file: where its code lies; None: where the module lies.
    """
    if is_own_package(module):
        return False
    if (module or "").partition(".")[0] in sys.stdlib_module_names:
        return True
    return _is_in_a_site(_file_of(module or "") if file is None else file)


@functools.lru_cache(maxsize=4096)
def _file_of(module: str) -> str:
    return getattr(sys.modules.get(module), "__file__", None) or ""


@functools.lru_cache(maxsize=4096)
def _is_in_a_site(file: str) -> bool:
    return file.startswith(_INSTALLED) or any(site in file for site in _SITES)
