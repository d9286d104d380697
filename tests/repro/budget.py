"""How much a claim may cost: the quick form by default, the published one on request.

`METAFOCUS_REPRO=full` runs the budgets that were published; unset or `quick` runs what a CI job
can afford, with tolerances of its own.
"""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

_WANTED = os.environ.get("METAFOCUS_REPRO") or "quick"
if _WANTED not in ("quick", "full"):
    raise ValueError(f'METAFOCUS_REPRO must be "quick" or "full", got {_WANTED!r}.')

FULL = _WANTED == "full"


def pick(quick: T, full: T) -> T:
    """Return what this run can afford."""
    return full if FULL else quick
