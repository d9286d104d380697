"""Runs Python code that a model wrote, in a process with limits.

The limits protect the evaluation against faulty programs: endless loops, too much memory, endless
output, too many processes, and child processes that are left behind. They do not protect against an
attacker: the program can read what this user can read, and it can fill the disk. For hostile code,
run the whole evaluation in a virtual machine. `walls` says which protections of the kernel are
active here.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metafocus.checks import positive, whole
from metafocus.errors import DataError

_GUARD = str(Path(__file__).with_name("guard.py"))
_PYTHON = (sys.executable, "-I", "-B", "-u", "-X", "utf8", _GUARD)
_TRIAL_SECONDS = 30


@dataclass(frozen=True)
class Limits:
    """The limits of one call of the tool.

    Args:
        seconds: seconds of wall time.
        cpu_seconds: whole seconds of processor time, over all threads.
        memory: bytes of address space.
        output: bytes of standard output and error together; a program that prints more is ended.
        file: bytes of each file that it writes.

    Raises:
        DataError: if a limit is not positive, or if a whole number is needed and it is not one.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 1 << 30
    output: int = 10_000
    file: int = 1 << 24

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "seconds":
                positive(name, value, error=DataError)
            else:
                whole(name, value, 1, error=DataError)


@dataclass(frozen=True)
class Walls:
    """The protections that the kernel enforces on this machine, for compiled programs too.

    Attributes:
        namespaces: whether the program has no network, and all its processes end with it.
        system_calls: whether it can neither open a socket nor start a process.
    """

    namespaces: bool
    system_calls: bool


@dataclass(frozen=True)
class Ran:
    """The result of a program.

    Attributes:
        output: standard output and error in their order; bytes that are not UTF-8 are replaced.
        code: the exit status, or minus the number of the signal that ended it.
        stopped: "", or the limit that ended it: "wall time", "CPU time" or "output".
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


def run_python(code: str, limits: Limits | None = None) -> Ran:
    r"""Run a program in a new temporary directory, and return its output.

    It runs in isolated mode (`python -I`) with the installed packages, without the environment
    variables of the evaluation and without input. It can start threads but no processes, and it
    cannot open sockets. At the end its process group is killed and its directory is removed.

    Args:
        code: Python source.
        limits: default `Limits()`.

    Raises:
        DataError: if the system is not Linux.

    Example:
        >>> from metafocus.evals.agentic import run_python
        >>> run_python("print(6 * 7)").output
        '42\n'
    """
    if sys.platform != "linux":
        raise DataError(
            f"sys.platform={sys.platform!r}: the Python tool needs Linux; go without it"
        )
    limits = limits or Limits()
    numbers = (limits.cpu_seconds, limits.memory, limits.file)
    with tempfile.TemporaryDirectory(
        prefix="metafocus-tool-", ignore_cleanup_errors=True
    ) as folder:
        # A lone surrogate cannot be encoded, so it is written as an escape sequence.
        (Path(folder) / "program.py").write_bytes(
            textwrap.dedent(code).encode("utf-8", "backslashreplace")
        )
        start = time.monotonic()
        process = subprocess.Popen(
            [*_PYTHON, "program.py", *map(str, numbers)],
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,
        )
        try:
            output, stopped = _read(process, limits)
        finally:
            cpu = _end(process)
        took = time.monotonic() - start
    if not stopped and process.returncode < 0 and cpu >= limits.cpu_seconds - 0.1:
        stopped = "CPU time"
    return Ran(output.decode("utf-8", "replace"), process.returncode, stopped, took)


@functools.cache
def walls() -> Walls:
    """Return which protections of the kernel this user can activate."""
    found = subprocess.run([*_PYTHON, "--check"], capture_output=True, timeout=_TRIAL_SECONDS)
    words = found.stdout.split()
    return Walls(*(word == b"1" for word in words)) if len(words) == 2 else Walls(False, False)


def _environment(folder: str) -> dict[str, str]:
    # One thread, because each thread of a BLAS uses some of the address space.
    names = {"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8"}
    return {**names, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _read(process: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, str]:
    """Read until the program ends or a limit stops it; too long output is cut at the end."""
    pipe: Any = process.stdout
    kept, open_ = bytearray(), True
    ready = select.poll()  # works for any number of open files, unlike select()
    ready.register(pipe, select.POLLIN)
    deadline = time.monotonic() + limits.seconds
    # The program may also close its output and continue.
    while open_ or not _ended(process):
        left = deadline - time.monotonic()
        if left <= 0:
            return bytes(kept), "wall time"
        if not open_:
            time.sleep(0.002)
        elif ready.poll(math.ceil(1000 * left)):
            chunk = os.read(pipe.fileno(), 65536)
            room = limits.output - len(kept)
            kept.extend(chunk[:room])
            if len(chunk) > room:
                return bytes(kept), "output"
            open_ = bool(chunk)
    return bytes(kept), ""


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether it ended, without reaping it, so that its number is not reused yet."""
    how = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, how) is not None


def _end(process: subprocess.Popen[bytes]) -> float:
    """Kill the remaining processes, reap the first, and return the processor time of all."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime
