"""Runs in the tool's process before the program: limits, Landlock, and a filter of system calls.

`sandbox` starts this file as a script, by path and with `python -I`, so it imports the standard
library only. Under bubblewrap the limits and the filter are enough. Without it Landlock takes the
place of the missing mounts: the program can read the system and the Python environment, and write
its own directory only. The filter (x86-64 and arm64) refuses processes, sockets, signals to other
processes, changes of their limits, memory that no limit counts, and what would hide an open file
from `folders.removed`. With Landlock it also refuses changes of modes and owners, which Landlock
does not judge.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import select
import signal
import struct
import sys
import traceback
import types
from typing import Any

# Numbers of system calls on x86-64 and arm64; None where there is no such call.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # Processes and sockets; clone is judged by its flags, and clone3 is hidden from the C library.
    "fork": (57, None), "vfork": (58, None), "socket": (41, 198),
    "unshare": (272, 97), "setns": (308, 268),
    # Other processes of the same user.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "move_pages": (279, 239),
    "migrate_pages": (256, 238), "kcmp": (312, 272), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    # Memory that is neither address space nor a file of the program, and calls that do it all.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "io_uring_setup": (425, 425),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    # A message can carry an open file, which no table of open files shows meanwhile.
    "sendmsg": (46, 211), "sendmmsg": (307, 269),
}  # fmt: skip
_METADATA: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "file_setattr": (469, 469),
}  # fmt: skip
# Allowed for this process only, which is 0 or its own number in the first argument.
_OWN = {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261),
        "sched_setaffinity": (203, 122)}  # fmt: skip
# Refused where an argument, counted from 0, has one of these values.
_SOME: tuple[tuple[tuple[int, int], int, tuple[int, ...]], ...] = (
    ((157, 167), 0, (1,)),  # prctl: what ends this process with the evaluation must stay
    ((72, 25), 1, (8, 15, 1024)),  # fcntl: a signal to the owner of a file; leases
    # ioctl: the owner again (2), and attributes of a file, for which it need not be writable.
    ((16, 29), 1, (0x8901, 0x8902, 0x40086602, 0x40046602, 0x401C5820, 0x40087602)),
)
# clone3, whose flags the filter cannot read; close_range, which can give a thread a table of open
# files of its own. The C library and Python then use clone and close.
_ABSENT = (435, 436)
# A new thread, which shares the table of open files.
_CLONE, _THREAD, _SAME_FILES = (56, 220), 0x10000, 0x400
_OTHER_ABI = 0x40000000
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
# Codes of BPF: load a word at an offset; jump if equal, if greater or equal, if a bit is set;
# return.
_LOAD, _EQUAL, _AT_LEAST, _BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16
# Arguments of prctl.
_DEATH_SIGNAL, _NO_NEW_PRIVILEGES, _SET_FILTER, _FILTER = 1, 38, 22, 2

# Landlock: its system calls have these numbers on all machines. The third version also judges
# truncation, the fourth TCP, the fifth devices, the sixth signals and abstract sockets.
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_LEAST = 3
_EXECUTE, _READ_FILE, _READ_FOLDER, _WRITE = 1, 4, 8, 2
_EVERY = {3: 0x7FFF, 5: 0xFFFF}
_SHOWN = ("/dev/zero", "/dev/random", "/dev/urandom", "/proc/cpuinfo")
_OF_FILES = 0x1 | 0x2 | 0x4 | 0x4000 | 0x8000  # the rights that a file can have


def landlock_version() -> int:
    """Return the version of Landlock in this kernel, or 0 if it is off or too old."""
    libc = ctypes.CDLL(None)
    found = libc.syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return found if found >= _LEAST else 0


def confine(folder: str, readable: list[str]) -> None:
    """Let this process write only `folder`, and read only it and `readable`.

    Raises:
        OSError: if the kernel does not accept it.
    """
    version = landlock_version()
    files = _EVERY[5 if version >= 5 else 3]
    tcp, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    # A shorter structure is one of an older version.
    size = 24 if scopes else 16 if tcp else 8
    rules = struct.pack("QQQ", files, tcp, scopes)[:size]
    ruleset = _checked("Landlock", _CREATE, rules, ctypes.c_size_t(size), ctypes.c_uint32(0))
    read = _EXECUTE | _READ_FILE | _READ_FOLDER
    for path, rights in [
        *((path, read) for path in readable),
        *((path, _READ_FILE) for path in _SHOWN),
        ("/dev/null", _READ_FILE | _WRITE),
        (folder, files),
    ]:
        with contextlib.suppress(FileNotFoundError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights if os.path.isdir(path) else rights & _OF_FILES
            rule = struct.pack("=Qi", allowed, place)
            _checked("Landlock", _ADD, ruleset, 1, rule, ctypes.c_uint32(0))
            os.close(place)
    _checked("Landlock", _RESTRICT, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)


def _checked(what: str, number: int, *arguments: Any) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(ctypes.c_long(number), *arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return found


def drop_privileges() -> None:
    """Give up all capabilities, those of a later exec too."""
    libc = ctypes.CDLL(None)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    libc.capset(header, none)


def refuse_system_calls(metadata: bool) -> bool:
    """Let the kernel refuse the calls above; return False if it accepts no filter."""
    if platform.machine() not in _MACHINES:
        return False
    at, machine = _MACHINES[platform.machine()]
    refuse = (_RETURN, 0, 0, _ERROR | _EPERM)
    code = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, machine),
        refuse,
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _OTHER_ABI),
        refuse,
        *(line for n in _ABSENT for line in ((_EQUAL, 0, 1, n), (_RETURN, 0, 0, _ERROR | _ENOSYS))),
    ]
    for numbers in {**_REFUSED, **(_METADATA if metadata else {})}.values():
        if numbers[at] is not None:
            code += [(_EQUAL, 0, 1, numbers[at]), refuse]
    for numbers in _OWN.values():
        code += [
            (_EQUAL, 0, 5, numbers[at]),
            (_LOAD, 0, 0, _FIRST_ARGUMENT),
            (_EQUAL, 2, 0, 0 if numbers[at] not in (62, 129) else os.getpid()),
            (_EQUAL, 1, 0, os.getpid()),
            refuse,
            (_RETURN, 0, 0, _ALLOW),
        ]
    for numbers, argument, values in _SOME:
        code += [
            (_EQUAL, 0, 2 + 2 * len(values), numbers[at]),
            (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * argument),
            *(line for value in values for line in ((_EQUAL, 0, 1, value), refuse)),
            (_RETURN, 0, 0, _ALLOW),
        ]
    code += [
        (_EQUAL, 0, 4, _CLONE[at]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_BIT, 0, 1, _THREAD),  # threads are allowed: the memory limit bounds their number
        (_BIT, 1, 0, _SAME_FILES),
        refuse,
        (_RETURN, 0, 0, _ALLOW),
    ]
    table = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HP", len(code), ctypes.addressof(table))
    libc = ctypes.CDLL(None)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    return libc.prctl(_SET_FILTER, _FILTER, ctypes.c_char_p(program), 0, 0) == 0


def _limit(cpu: int, memory: int, file: int) -> None:
    # The first limit sends a signal of its own, which tells the reason; the second one kills.
    for what, *most in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, file, file),
        (resource.RLIMIT_NOFILE, 256, 256),  # each pipe can hold a megabyte
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        # Lower limits of the evaluation itself are kept.
        with contextlib.suppress(ValueError):
            resource.setrlimit(what, (most[0], most[1]))


def _is_read(pipe: int) -> bool:
    """Return whether somebody can still read what is written to a pipe."""
    ready = select.poll()
    ready.register(pipe, 0)
    return not ready.poll(0)


def _confined(way: str, cpu: str, most: str, size: str, path: str, *readable: str) -> None:
    if way != "bubblewrap":
        # Bubblewrap does this itself, from outside of the namespaces.
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if not _is_read(1):
        sys.exit(1)  # the evaluation ended before it could take this process with it
    _limit(int(cpu), int(most), int(size))
    drop_privileges()
    if way == "landlock":
        confine(os.getcwd(), list(readable))
    refuse_system_calls(way == "landlock")
    _main(path)


def _main(path: str) -> None:
    def show(kind: type[BaseException], value: BaseException, where: Any) -> None:
        report = traceback.TracebackException(kind, value, where)
        kept = [frame for frame in report.stack if frame.filename != __file__]
        report.stack = traceback.StackSummary.from_list(kept)
        print("".join(report.format()), end="", file=sys.stderr)

    with open(path, encoding="utf-8") as file:
        text = file.read()
    sys.excepthook = show
    sys.argv = [path]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(text, path, "exec"), main.__dict__)


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        print(landlock_version(), int(refuse_system_calls(True)))
    else:
        _confined(*sys.argv[1:])
