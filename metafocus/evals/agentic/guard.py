"""Runs in the tool's process before the program: namespaces, limits, a filter and a hook.

`sandbox` starts this file as a script, by path and with `python -I`, so it imports the standard
library only. In namespaces of its own the program has no network, and all its processes end with
it. On x86-64 and arm64 the kernel filters system calls, so that starting a process or opening a
socket fails for compiled code too. An audit hook does the same in Python on all machines.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import traceback
import types
from typing import Any

# For each machine: the audit number, the number of clone, and the refused calls: fork, vfork,
# socket, ptrace, process_vm_readv and -writev, kill, and io_uring_setup, which can do some of them
# too.
_CALLS = {
    "x86_64": (0xC000003E, 56, (57, 58, 41, 101, 310, 311, 62, 425)),
    "aarch64": (0xC00000B7, 220, (198, 117, 270, 271, 129, 425)),
}
_CLONE3, _OTHER_ABI, _THREAD = 435, 0x40000000, 0x10000
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
# Codes of BPF: load a word at an offset; jump if equal, if greater or equal, if a bit is set;
# return.
_LOAD, _EQUAL, _AT_LEAST, _BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16

_REFUSED = (
    "socket.",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "os.kill",
    "subprocess.",
    "pty.",
)
_HARMLESS = ("socket.__new__", "socket.gethostname")


# Arguments of unshare, prctl and mount.
_USER, _NET, _PROCESSES, _MOUNTS = 0x10000000, 0x40000000, 0x20000000, 0x00020000
_DEATH_SIGNAL, _NO_NEW_PRIVILEGES, _SET_FILTER, _FILTER = 1, 38, 22, 2
_RECURSIVE_PRIVATE = 0x4000 | 0x40000


def enter_namespaces() -> bool:
    """Continue in a child process without network; return False if this is not allowed.

    The child is the first process of its namespace. It sees no other processes, and everything that
    it starts ends with it. This process waits for it and ends in the same way.
    """
    libc = ctypes.CDLL(None)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_USER | _NET | _PROCESSES | _MOUNTS):
        return False
    with contextlib.suppress(OSError):
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(abs(code))
    libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    # If a container does not allow mounts, other processes are visible, but cannot be reached.
    libc.mount(b"none", b"/", None, _RECURSIVE_PRIVATE, None)
    libc.mount(b"proc", b"/proc", b"proc", 0, None)
    return True


def refuse_system_calls() -> bool:
    """Let the kernel refuse new processes and sockets; return False if it accepts no filter."""
    if platform.machine() not in _CALLS:
        return False
    machine, clone, refused = _CALLS[platform.machine()]
    refuse = (_RETURN, 0, 0, _ERROR | _EPERM)
    code = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, machine),
        refuse,
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _OTHER_ABI),
        refuse,
        # The C library then uses clone, whose flags the filter can read.
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERROR | _ENOSYS),
    ]
    for number in refused:
        code += [(_EQUAL, 0, 1, number), refuse]
    code += [
        (_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_BIT, 1, 0, _THREAD),  # threads are allowed: the memory limit bounds their number
        refuse,
        (_RETURN, 0, 0, _ALLOW),
    ]
    table = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HP", len(code), ctypes.addressof(table))
    libc = ctypes.CDLL(None)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    return libc.prctl(_SET_FILTER, _FILTER, ctypes.c_char_p(program), 0, 0) == 0


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(_REFUSED) and event not in _HARMLESS:
        raise PermissionError(f"{event}: this tool has no network and starts no processes")


def _limit(cpu: int, memory: int, file: int) -> None:
    for what, most in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_CORE, 0),
    ):
        # Lower limits of the evaluation itself are kept.
        with contextlib.suppress(ValueError):
            resource.setrlimit(what, (most, most))


def _main(path: str) -> None:
    def show(kind: type[BaseException], value: BaseException, where: Any) -> None:
        report = traceback.TracebackException(kind, value, where)
        kept = [frame for frame in report.stack if frame.filename != __file__]
        report.stack = traceback.StackSummary.from_list(kept)
        print("".join(report.format()), end="", file=sys.stderr)

    sys.excepthook = show
    sys.argv = [path]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    with open(path, encoding="utf-8") as file:
        text = file.read()
    exec(compile(text, path, "exec"), main.__dict__)


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        print(int(enter_namespaces()), int(refuse_system_calls()))
    else:
        enter_namespaces()
        _limit(*map(int, sys.argv[2:]))
        refuse_system_calls()
        sys.addaudithook(_refuse)
        _main(sys.argv[1])
