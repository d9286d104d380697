"""Functions of cells at the top of a module, so that every process can import them."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import metafocus as mf

CELLS = [{"x": x, "scale": scale} for x in range(4) for scale in (0.5, 2.0)]


@dataclass(frozen=True)
class Noted:
    """Notes each call in a file, so that a test can count them; fails for the given `x`."""

    calls: str
    seconds: float = 0.0
    bad: tuple[int, ...] = ()

    def __call__(self, cell: dict[str, Any]) -> dict[str, Any]:
        with Path(self.calls).open("a") as file:
            file.write(f"{cell['x']} {cell['scale']}\n")
        time.sleep(self.seconds)
        if cell["x"] in self.bad:
            raise ArithmeticError(f"no answer for {cell['x']}")
        return {"value": cell["x"] * cell["scale"], "process": os.getpid()}


def calls(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def pool(workers: int = 2) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


if __name__ == "__main__":
    # A run that a test kills: folder, file of calls, and how the cells run.
    folder, noted, how = sys.argv[1:]
    from sweeping import Noted as Importable

    fn = Importable(noted, seconds=0.15)
    if how == "pool":
        with pool() as executor:
            mf.sweep(fn, CELLS, folder=folder, executor=executor)
    else:
        mf.sweep(fn, CELLS, folder=folder)
