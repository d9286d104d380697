"""The directory of a program: its size while it runs, and its removal whatever is in it.

A directory is locked for as long as its evaluation lives. The system frees the lock of a process
that was killed, so the next evaluation finds the directories that were left, and removes them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "metafocus-tool-"
_LONGEST = 3000


@contextlib.contextmanager
def temporary() -> Iterator[str]:
    """Yield a new directory that only this user can open, and remove it at the end."""
    remove_left(tempfile.gettempdir())
    folder, lock = _locked()
    try:
        yield folder
    finally:
        remove(folder)
        os.close(lock)


@functools.cache
def remove_left(place: str) -> None:
    """Remove, once per process, the directories of this user whose evaluation was killed."""
    import fcntl  # not on Windows, where this module is imported too

    for folder in Path(place).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(str(folder))
            finally:
                os.close(lock)


def _locked() -> tuple[str, int]:
    """Return a new directory and the descriptor that holds its lock."""
    import fcntl

    while True:
        folder = tempfile.mkdtemp(prefix=_PREFIX)
        # Until it is locked, another evaluation may take it for a left one and remove it.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.isdir(folder):
                return folder, lock
            os.close(lock)


def remove(folder: str) -> None:
    """Remove a directory, however deeply nested and whatever its modes; what cannot be stays.

    The folders in a folder are moved up before it is removed. So paths stay short, and nothing
    recurs: a program may nest thousands of folders.
    """
    names = (f"removed-{i}" for i in itertools.count())
    with contextlib.suppress(OSError):
        while waiting := os.listdir(folder):
            for name in waiting:
                path = os.path.join(folder, name)
                if not stat.S_ISDIR(os.lstat(path).st_mode):
                    os.unlink(path)
                    continue
                os.chmod(path, stat.S_IRWXU)
                for inner in os.listdir(path):
                    below = os.path.join(path, inner)
                    if stat.S_ISDIR(os.lstat(below).st_mode):
                        os.chmod(below, stat.S_IRWXU)
                        os.rename(below, _free(folder, names))
                    else:
                        os.unlink(below)
                os.rmdir(path)
        os.rmdir(folder)


def _free(folder: str, names: Iterator[str]) -> str:
    """Return a path in a folder that does not exist; a program may use such names too."""
    return next(path for name in names if not os.path.lexists(path := os.path.join(folder, name)))


def too_much(folder: str, size: int, files: int) -> bool:
    """Return whether a directory has more bytes or entries than it may; it may change meanwhile.

    Paths of 3000 characters are too much as well: beyond 4096 nothing could be counted.
    """
    waiting, found, used = [folder], 0, 0
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                found += 1
                with contextlib.suppress(OSError):
                    used += 512 * entry.stat(follow_symlinks=False).st_blocks
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                if found > files or used > size or len(entry.path) > _LONGEST:
                    return True
    return False


def removed(pid: int, most: int) -> int:
    """Return how many bytes of files a process keeps that have no name any more.

    Of a file that is open the size is known. One that is only mapped counts as `most`, the limit of
    a file: its size cannot be seen, and a mapping of one page keeps all of it.
    """
    held: dict[int, int] = {}
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                found = entry.stat()
                if stat.S_ISREG(found.st_mode) and not found.st_nlink:
                    held[found.st_ino] = 512 * found.st_blocks
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as lines:
        for line in lines:
            # Shared memory without a file has this name; the limit of the address space counts it.
            if line.endswith(b" (deleted)\n") and b" /dev/zero " not in line:
                held.setdefault(int(line.split()[4]), most)
    return sum(held.values())


def seen_from_outside(pid: int, folder: str) -> str | None:
    """Return where a directory in the file system of bubblewrap's child is seen from here."""
    with contextlib.suppress(OSError, IndexError):
        child = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        return f"/proc/{child}/root{folder}"
    return None
