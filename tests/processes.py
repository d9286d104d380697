"""Processes that are forks of this one, which has imported everything already."""

from __future__ import annotations

import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable

import torch


def forked(work: Callable[[], object], env: dict[str, str] | None = None) -> int:
    """Do some work in a new process with one thread; return its number."""
    with warnings.catch_warnings():
        # Python 3.12 warns that other threads may hold locks; torch's pool is left alone here.
        warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(env or {})
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """Return the exit status of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def failed(pids: Iterable[int]) -> bool:
    """Wait for all; return whether any ended with an error or by a signal."""
    return any([wait(pid) for pid in pids])


def environments(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank of a new group, as torchrun sets it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(ranks)
    ]  # fmt: skip
