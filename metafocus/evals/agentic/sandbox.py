"""Runs Python code that a model wrote, in a process with limits and behind a wall of the kernel.

`walls` says which wall there is: bubblewrap, or Landlock with a filter of system calls. Without any
of them a program is not run, unless the caller says that it may be.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metafocus.checks import positive, whole
from metafocus.errors import DataError
from metafocus.evals.agentic import folders
from metafocus.evals.agentic.isolation import (
    FIRST_TO_END,
    GUARD,
    PYTHON,
    SEALED,
    bubblewrap,
    readable,
    walls,
)

_LOOK = 0.1  # seconds between two looks at the files of a program
_SIGNALLED = 128  # bubblewrap ends with this plus the number of the signal


@dataclass(frozen=True)
class Limits:
    """The limits of one call of the tool.

    Args:
        seconds: seconds of wall time.
        cpu_seconds: whole seconds of processor time, over all threads.
        memory: bytes of address space.
        output: bytes of standard output and error together; a program that prints more is ended.
        file: bytes of each file that it writes.
        disk: bytes of all its files together.
        files: the number of its files and folders.

    Raises:
        DataError: if a limit is not positive, or if a whole number is needed and it is not one.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 1 << 30
    output: int = 10_000
    file: int = 1 << 24
    disk: int = 1 << 26
    files: int = 10_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "seconds":
                positive(name, value, error=DataError)
            else:
                whole(name, value, 1, error=DataError)


@dataclass(frozen=True)
class Ran:
    """The result of a program.

    Attributes:
        output: standard output and error in their order; bytes that are not UTF-8 are replaced.
        code: the exit status, or minus the number of the signal that ended it.
        stopped: "", or the limit that ended it: "wall time", "CPU time", "output" or "files".
        seconds: seconds of wall time.
    """

    output: str
    code: int
    stopped: str
    seconds: float

    @property
    def text(self) -> str:
        """The output for the model, with the reason if the program failed."""
        if self.stopped:
            return f"{self.output}\n[stopped: limit of {self.stopped}]"
        return f"{self.output}\n[exit status {self.code}]" if self.code else self.output


def run_python(code: str, limits: Limits | None = None, *, unsafe: bool = False) -> Ran:
    r"""Run a program in a new temporary directory, and return its output.

    It runs in isolated mode (`python -I`) with the installed packages, without the environment
    variables of the evaluation and without input. It can read the system and Python only, write its
    directory only, start threads but no processes, and open no sockets. It ends with this process,
    and nothing of it remains.

    Args:
        code: Python source; it may be indented as a whole.
        limits: default `Limits()`.
        unsafe: whether to run it on a machine without any wall. It can then read and change
            whatever this user can.

    Raises:
        DataError: if the system is not Linux, or if there is no wall.

    Example:
        >>> from metafocus.evals.agentic import run_python
        >>> run_python("print(6 * 7)").output
        '42\n'
    """
    check_walls(unsafe)
    limits = limits or Limits()
    with folders.temporary() as folder:
        program = Path(folder, "program.py")
        # A lone surrogate cannot be encoded, so it is written as an escape sequence.
        program.write_bytes(textwrap.dedent(code).encode("utf-8", "backslashreplace"))
        way, start = walls().way, time.monotonic()
        process = subprocess.Popen(
            _command(folder, limits, way),
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,
        )
        try:
            output, stopped = _read(process, limits, folder, way)
        finally:
            _end(process)
        took = time.monotonic() - start
    code_ = process.returncode
    if way == "bubblewrap" and code_ > _SIGNALLED:
        code_ = _SIGNALLED - code_
    # A program may ignore the signal of the limit; a second later it is killed.
    if not stopped and (
        code_ == -signal.SIGXCPU or (code_ == -signal.SIGKILL and took >= limits.cpu_seconds)
    ):
        stopped = "CPU time"
    return Ran(output.decode("utf-8", "replace"), code_, stopped, took)


def check_walls(unsafe: bool) -> None:
    """Raise if programs of a model cannot be run here.

    Raises:
        DataError: if the system is not Linux, or if there is no wall and `unsafe` is not set.
    """
    if sys.platform != "linux":
        raise DataError(
            f"sys.platform={sys.platform!r}: the Python tool needs Linux; go without it"
        )
    if walls().way == "none" and not unsafe:
        raise DataError(
            "there is no wall around the Python tool: install bubblewrap (bwrap), or use a kernel "
            "with Landlock (Linux 6.2 or later, x86-64 or arm64). A program could otherwise read "
            "and change whatever you can. To take this risk, pass unsafe_tools"
        )


def _command(folder: str, limits: Limits, way: str) -> list[str]:
    numbers = map(str, (limits.cpu_seconds, limits.memory, limits.file))
    guarded = [*PYTHON, GUARD, way, *numbers, "program.py"]
    if way == "bubblewrap":
        shown = ["--ro-bind", f"{folder}/program.py", f"{folder}/program.py"]
        return [*FIRST_TO_END, *bubblewrap(folder, limits.disk), *shown, *SEALED, *guarded]
    return [*FIRST_TO_END, *guarded, *(readable() if way == "landlock" else ())]


def _environment(folder: str) -> dict[str, str]:
    # One thread, because each thread of a BLAS uses some of the address space.
    names = {"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8"}
    return {**names, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _read(
    process: subprocess.Popen[bytes], limits: Limits, folder: str, way: str
) -> tuple[bytes, str]:
    """Read until the program ends or a limit stops it; too long output is cut at the end."""
    pipe: Any = process.stdout
    kept, open_ = bytearray(), True
    ready = select.poll()  # works for any number of open files, unlike select()
    ready.register(pipe, select.POLLIN)
    deadline, look = time.monotonic() + limits.seconds, 0.0
    # The program may also close its output and continue.
    while open_ or not _ended(process):
        now = time.monotonic()
        if now >= deadline:
            return bytes(kept), "wall time"
        if now >= look:
            look = now + _LOOK
            if _too_many_files(process.pid, limits, folder, way):
                return bytes(kept), "files"
        if not open_:
            time.sleep(0.002)
        elif ready.poll(math.ceil(1000 * min(deadline - now, _LOOK))):
            chunk = os.read(pipe.fileno(), 65536)
            room = limits.output - len(kept)
            kept.extend(chunk[:room])
            if len(chunk) > room:
                return bytes(kept), "output"
            open_ = bool(chunk)
    return bytes(kept), ""


def _too_many_files(pid: int, limits: Limits, folder: str, way: str) -> bool:
    if way == "bubblewrap":
        # Its file system bounds the bytes, those of removed files too.
        place = folders.seen_from_outside(pid, folder)
        return place is not None and folders.too_much(place, limits.disk, limits.files)
    removed = folders.removed(pid, limits.file)
    return folders.too_much(folder, limits.disk - removed, limits.files)


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether it ended, without reaping it, so that its number is not reused yet."""
    how = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, how) is not None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the remaining processes, and reap the first."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()
    process.wait()
