"""The modules of an example in `examples/`, which import one another by their plain names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@contextmanager
def example_modules(folder: str, names: tuple[str, ...]) -> Iterator[SimpleNamespace]:
    """Import modules of `examples/<folder>` for a `with` block; their names leave with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES / folder))
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        for name in names:
            sys.modules.pop(name, None)
