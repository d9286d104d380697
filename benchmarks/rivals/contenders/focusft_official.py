"""The official FocuSFT code: its trainer, from a checkout."""

from __future__ import annotations

import focusft

from benchmarks import focusft_step
from benchmarks.rivals.workloads import w6 as W6

PACKAGE = "focusft"


def w6(data, case):
    path = str(focusft.__path__[0]).rpartition("/")[0]
    step = focusft_step.official(W6.size(case), case["checkpointing"], path, data["start"])
    return {"official": step}
