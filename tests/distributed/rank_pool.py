"""Processes of one group that work through many cases, and are replaced if one kills them.

A case is a function of the rank. What it returns is saved; an error is saved by type and text. A
group that crashes, or that is silent for too long, is noted for the case it was at, and a new one
goes on with the next case.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

from processes import environments, failed, forked


def run(
    cases: dict[str, Callable[[int], Any]], folder: Path, *, ranks: int = 2, limit: float = 120
) -> None:
    """Run every case in some processes; `folder` receives `NAME.rank.pt` of each rank."""
    left = list(cases)
    while left:
        work = partial(_work, cases, left, folder)
        every = enumerate(environments(ranks))
        pids = [forked(partial(work, rank), env) for rank, env in every]
        fate = _watch(pids, left, folder, limit)
        if fate is None:
            return
        at = next(name for name in left if not _done(name, folder, ranks))
        for rank in range(ranks):
            torch.save({"error": "Crash", "text": fate}, _path(at, rank, folder))
        left = left[left.index(at) + 1 :]


def alone(cases: dict[str, Callable[[], Any]], folder: Path) -> None:
    """Run cases in one process without a group; each file is `NAME.alone.pt`."""

    def work() -> None:
        for name, case in cases.items():
            torch.save(_outcome(case), folder / f"{name}.alone.pt")

    assert not failed([forked(work)])


def load(name: str, folder: Path, rank: int | str) -> Any:
    """Return what a case left: its result, or `{"error": type, "text": ...}`."""
    return torch.load(_path(name, rank, folder), weights_only=False)


def _path(name: str, rank: int | str, folder: Path) -> Path:
    return folder / f"{name}.{rank}.pt"


def _done(name: str, folder: Path, ranks: int) -> bool:
    return all(_path(name, rank, folder).exists() for rank in range(ranks))


def _work(cases: dict, left: list[str], folder: Path, rank: int) -> None:
    dist.init_process_group("gloo")
    for name in left:
        found = _outcome(partial(cases[name], rank))
        path = _path(name, rank, folder)
        torch.save(found, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        dist.barrier()
    dist.destroy_process_group()


def _outcome(case: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return case()
        except Exception as error:
            return {"error": type(error).__name__, "text": str(error)}


def _watch(pids: list[int], left: list[str], folder: Path, limit: float) -> str | None:
    """Return None when all processes have ended well, or else what became of them."""
    running, since, count = set(pids), time.monotonic(), 0
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.discard(pid)
                code = os.waitstatus_to_exitcode(status)
                if code:
                    _stop(running)
                    return f"a process ended with {code}"
        now = sum(_done(name, folder, len(pids)) for name in left)
        if now > count:
            since, count = time.monotonic(), now
        if time.monotonic() - since > limit:
            _stop(running)
            return f"nothing for {limit} s"
        time.sleep(0.02)
    return None


def _stop(pids: set[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
