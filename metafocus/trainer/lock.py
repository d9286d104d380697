"""One run per output directory: a lock that the first rank holds for as long as the run lives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from metafocus.errors import DataError
from metafocus.files import unwritable
from metafocus.trainer.ranks import from_first

LOCK = ".run.lock"
HOLDER = ".run.json"
"""Who holds the lock: a process number and the name of a machine."""


@contextlib.contextmanager
def one_run(folder: Path) -> Iterator[None]:
    """Hold the lock of an output directory; the directory is made, and removed if it stays empty.

    Every rank calls it, and the first one holds the lock for all.

    The operating system frees the lock when the process ends in whatever way, so that a lock left
    by a process that was killed is simply taken. A process that holds it may take it again.

    Raises:
        DataError: on every rank, if another process holds it, with that process and its machine;
            if the directory cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place, one_run(Path(place)):
        ...     sorted(path.name for path in Path(place).iterdir())
        ['.run.json', '.run.lock']
    """
    new, lock = not folder.exists(), None

    def acquire() -> None:
        nonlocal lock
        lock = _acquired(folder)

    from_first(acquire)
    try:
        yield
    finally:
        if lock is not None:
            _release(lock, folder)
            if new:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def files_of_a_run(folder: Path) -> list[Path]:
    """Return what a directory holds besides the lock.

    Example:
        >>> files_of_a_run(Path("nowhere"))
        []
    """
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if path.name not in (LOCK, HOLDER)]


def _acquired(folder: Path) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One object for a path in a process, which counts how often it was taken.
        lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
        lock.acquire()
        # Only the process with the lock writes it; a half-written file is read as no name.
        found = {"pid": os.getpid(), "host": socket.gethostname()}
        (folder / HOLDER).write_text(json.dumps(found), encoding="utf-8")
    except Timeout as error:
        raise DataError(
            f"output_dir={str(folder)!r} is in use by {_holder(folder)}: name another directory, "
            "or wait until that run has ended."
        ) from error
    except OSError as error:
        raise unwritable("output_dir", folder, error) from error
    return lock


def _release(lock: FileLock, folder: Path) -> None:
    if lock.lock_counter == 1:
        # While it is held: the next holder makes files of its own.
        for name in (HOLDER, LOCK):
            (folder / name).unlink(missing_ok=True)
    lock.release()


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
