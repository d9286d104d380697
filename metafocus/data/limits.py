"""Limits of time and memory for a block of code, such as the rendering of a chat template."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATM = Path("/proc/self/statm")


class OutOfTimeError(Exception):
    """A block of code ran longer than its limit."""


@contextmanager
def limited(seconds: float, megabytes: int) -> Iterator[None]:
    """Interrupt the block after `seconds`; refuse it more than `megabytes` of new memory.

    The limits hold in the main thread of a POSIX system, that of memory on Linux only. Elsewhere
    the block runs without them.

    Raises:
        OutOfTimeError: after `seconds`.
        MemoryError: if the block asks for more memory.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    with _alarm(seconds), _address_space(megabytes * 2**20):
        yield


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise OutOfTimeError

    handler = signal.signal(signal.SIGALRM, stop)
    # Another timer may run, such as that of pytest-timeout; it continues afterwards.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def _address_space(size: int) -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(_STATM.read_text().split()[0]) * resource.getpagesize()
    least = min((limit for limit in (soft, hard) if limit >= 0), default=used + size)
    resource.setrlimit(resource.RLIMIT_AS, (min(used + size, least), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
