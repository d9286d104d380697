"""Python that a model wrote, run in a process with limits.

The limits keep a program that went wrong from harming the evaluation: an endless loop, all memory,
endless output, a bomb of processes, a forgotten child. They are no wall against an attacker: the
program reads what this user may read, and may fill the disk. For hostile code run the whole
evaluation in a virtual machine. Which of the kernel's walls stand here is what `walls` says.
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
    """What one call of the tool may use.

    Args:
        seconds: of wall time.
        cpu_seconds: of processor time, whole ones, all threads together.
        memory: bytes of address space.
        output: bytes of standard output and error together; a program that prints more is ended.
        file: bytes of each file that it writes.

    Raises:
        DataError: for a limit that is not positive, or a fraction where a whole number is needed.
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
    """What the kernel enforces on this machine, whatever the program is made of.

    Attributes:
        namespaces: it has no network interface that leads anywhere, and no process outlives it.
        system_calls: it can neither open a socket nor start a process.
    """

    namespaces: bool
    system_calls: bool


@dataclass(frozen=True)
class Ran:
    """What a program did.

    Attributes:
        output: standard output and error as they came; bytes that are no UTF-8 are replaced.
        code: the exit status; minus the signal's number if one ended it.
        stopped: "", or which limit ended it: "wall time", "CPU time" or "output".
        seconds: of wall time.
    """

    output: str
    code: int
    stopped: str
    seconds: float

    @property
    def text(self) -> str:
        """The output and, if it did not end well, why: what a model is told."""
        if self.stopped:
            return f"{self.output}\n[stopped: limit of {self.stopped}]"
        return f"{self.output}\n[exit status {self.code}]" if self.code else self.output


def run_python(code: str, limits: Limits | None = None) -> Ran:
    r"""Run a program in a fresh temporary directory, and return what it printed.

    It runs in isolated mode (`python -I`) with the installed packages, without the evaluation's
    environment variables and without input. It can start threads but no processes, and open no
    sockets. At the end its process group is killed and its directory removed.

    Args:
        code: Python source.
        limits: default `Limits()`.

    Raises:
        DataError: not on Linux.

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
        # A lone surrogate is no text: it stands as an escape then.
        (Path(folder) / "program.py").write_bytes(code.encode("utf-8", "backslashreplace"))
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
    """Try which of the kernel's walls this user can put up."""
    found = subprocess.run([*_PYTHON, "--check"], capture_output=True, timeout=_TRIAL_SECONDS)
    words = found.stdout.split()
    return Walls(*(word == b"1" for word in words)) if len(words) == 2 else Walls(False, False)


def _environment(folder: str) -> dict[str, str]:
    # One thread: each thread of a BLAS takes a share of the address space.
    names = {"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8"}
    return {**names, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _read(process: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, str]:
    """Read until the program ends or a limit does; of a flood only the start is kept."""
    pipe: Any = process.stdout
    kept, open_ = bytearray(), True
    ready = select.poll()  # unlike select() it takes any number of open files
    ready.register(pipe, select.POLLIN)
    deadline = time.monotonic() + limits.seconds
    # It may also close its output and go on.
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
    """Whether it ended, without reaping it: its number must stay its own until the kill."""
    how = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, how) is not None


def _end(process: subprocess.Popen[bytes]) -> float:
    """Kill what is left, reap the first process, and return the processor time of all."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime
