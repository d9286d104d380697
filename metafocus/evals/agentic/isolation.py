"""The walls around the Python tool: bubblewrap if it is installed, else Landlock with a filter."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

GUARD = str(Path(__file__).with_name("guard.py"))
PYTHON = (sys.executable, "-I", "-B", "-u", "-X", "utf8")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
_TRIAL_SECONDS = 30


@dataclass(frozen=True)
class Walls:
    """The protections that the kernel enforces on this machine, for compiled programs too.

    Attributes:
        bubblewrap: whether programs run under bubblewrap: namespaces of their own, and no files but
            the system, the Python environment and their own directory.
        landlock: the version of Landlock, which takes the place of bubblewrap; 0 if there is none.
        system_calls: whether the filter refuses processes, sockets, and calls that concern other
            processes.
    """

    bubblewrap: bool
    landlock: int
    system_calls: bool

    @property
    def way(self) -> str:
        """How programs run here: "bubblewrap", "landlock", or "none" without any wall."""
        if self.bubblewrap:
            return "bubblewrap"
        return "landlock" if self.landlock and self.system_calls else "none"


@functools.cache
def walls() -> Walls:
    """Return which protections this user can activate here."""
    found = _printed([*PYTHON, GUARD, "--check"]).split()
    landlock, filtered = (int(found[0]), found[1] == "1") if len(found) == 2 else (0, False)
    trial = bubblewrap("/tmp/metafocus-tool-trial", 1 << 20)
    command = [*trial, *SEALED, *PYTHON, "-c", "print('inside')"]
    inside = trial and _printed(command) == "inside\n"
    return Walls(bool(inside), landlock, filtered)


def readable() -> list[str]:
    """Return the directories and files that a program needs: the system and Python."""
    python = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    # The real places too: an environment may be reached through links.
    python |= {os.path.realpath(path) for path in (*python, os.path.dirname(sys.executable))}
    python |= {os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))}
    every = [*_SYSTEM, *_FILES, *sorted(python)]
    return [path for path in dict.fromkeys(every) if path != "/" and os.path.exists(path)]


def bubblewrap(folder: str, size: int) -> list[str]:
    """Return the start of a command that runs another one in `folder`, or [] without bubblewrap.

    There the program has a file system of its own, whose only writable part is `folder`, a new one
    in memory of `size` bytes.
    """
    program = shutil.which("bwrap")
    if program is None:
        return []
    places = readable()
    kept = [path for path in places if not any(_inside(path, other) for other in places)]
    binds: list[str] = []
    for path in kept:
        # /lib is usually a link to /usr/lib.
        link = os.path.islink(path) and path in _SYSTEM
        binds += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    return [
        program,
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        *binds,
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--remount-ro",
        "/dev",
        "--ro-bind",
        GUARD,
        GUARD,
        "--size",
        str(size),
        "--tmpfs",
        folder,
        "--chdir",
        folder,
    ]


SEALED = ("--remount-ro", "/proc", "--remount-ro", "/")
"""The last options of bubblewrap: its root is in memory, and would have no limit."""

_FIRST = '{ echo 1000 >/proc/self/oom_score_adj; } 2>/dev/null; exec "$@"'
FIRST_TO_END = ("/bin/sh", "-c", _FIRST, "sh")
"""The start of a command that the kernel ends before all others where memory runs out."""


def _inside(path: str, other: str) -> bool:
    return path != other and Path(other) in Path(path).parents and not os.path.islink(path)


def _printed(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TRIAL_SECONDS, text=True)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
