"""Every promise about the Python tool, behind bubblewrap and behind Landlock."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from metafocus.errors import DataError
from metafocus.evals.agentic import Limits, Ran, Walls, folders, run_python, sandbox, walls

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tool needs Linux")


@pytest.fixture(params=["bubblewrap", "landlock"])
def way(request, monkeypatch):
    """As this machine runs programs with bubblewrap, and as it does without."""
    here = walls()
    if request.param == "bubblewrap" and not here.bubblewrap:
        pytest.skip("bubblewrap is not installed, or may make no namespaces")
    if request.param == "landlock":
        if not here.landlock or not here.system_calls:
            pytest.skip("this kernel has no Landlock, or takes no filter of system calls")
        monkeypatch.setattr(sandbox, "walls", lambda: Walls(False, here.landlock, True))
    return request.param


def last(ran: Ran) -> str:
    return ran.output.strip().splitlines()[-1]


def test_output_and_errors(way):
    assert run_python("print(6 * 7)") == Ran("42\n", 0, "", pytest.approx(0, abs=10))
    assert run_python("").output == ""
    assert run_python("  print(1)\n  print(2)").output == "1\n2\n"
    assert run_python("print(1)\r\nprint(2)\r\n").output == "1\n2\n"
    ran = run_python("import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(3)")
    assert (ran.output, ran.code, ran.stopped) == ("out\nerr\n", 3, "")
    assert ran.text == "out\nerr\n\n[exit status 3]"
    ran = run_python("def f():\n    return 1 / 0\n\nf()")
    assert ran.code == 1 and last(ran) == "ZeroDivisionError: division by zero"
    # The program's own lines, none of ours.
    assert 'File "program.py", line 2, in f\n    return 1 / 0' in ran.output
    assert "guard" not in ran.output and "exec(" not in ran.output
    assert "SyntaxError" in last(run_python("x = ("))
    assert (
        run_python("import sys; sys.stdout.buffer.write(b'a\\xff\\xfeb')").output
        == "a\ufffd\ufffdb"
    )
    assert run_python("print('\u00e9\u20ac\U0001f600')").output == "\u00e9\u20ac\U0001f600\n"
    assert run_python("print('\ud800')").code == 1
    ran = run_python("import os\nprint('before', flush=True)\nos.abort()")
    assert ran.output == "before\n" and ran.code == -signal.SIGABRT and ran.stopped == ""


def test_a_program_is_the_main_module(way):
    code = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from typing import get_type_hints\n"
        "@dataclass\nclass A:\n    x: int\n"
        "if __name__ == '__main__':\n    print(A(1), get_type_hints(A), __name__)"
    )
    assert run_python(code).output == "A(x=1) {'x': <class 'int'>} __main__\n"
    assert (
        run_python("import numpy as np; print(np.linalg.inv(np.eye(2))[0])").output == "[1. 0.]\n"
    )
    assert run_python("import asyncio; asyncio.run(asyncio.sleep(0)); print(1)").output == "1\n"
    threads = "import threading\nt = threading.Thread(target=print, args=(7,))\nt.start(); t.join()"
    assert run_python(threads).output == "7\n"
    files = (
        "import os, tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n    f.write('x')\n"
        "os.makedirs('a/b'); open('a/b/c', 'w').write('3'); os.rename('a/b/c', 'a/c')\n"
        "print(open('a/c').read(), open('/dev/null', 'w').write('x'), len(os.urandom(3)))"
    )
    assert run_python(files).output == "3 1 3\n"


def test_nothing_of_the_evaluation_is_seen(way, monkeypatch):
    monkeypatch.setenv("A_SECRET", "xyz")
    ran = run_python(
        "import os, sys\nprint(sorted(os.environ))\nprint(os.listdir('.'), os.getcwd())"
    )
    names, place = ran.output.splitlines()
    assert "A_SECRET" not in names and "'HOME'" in names
    assert place.startswith("['program.py']") and "metafocus-tool-" in place
    assert run_python("import sys; print(repr(sys.stdin.read()))").output == "''\n"
    assert run_python("import sys; print(sys.flags.isolated, '' in sys.path)").output == "1 False\n"
    secret = f"print(b'A_SECRET' in open('/proc/{os.getpid()}/environ', 'rb').read())"
    assert refused(run_python(secret))


def refused(ran: Ran) -> bool:
    """Whether a program failed at its first attempt, by the kernel."""
    words = ("PermissionError", "FileNotFoundError", "ProcessLookupError", "Read-only file system",
             "Invalid cross-device link")  # fmt: skip
    return ran.code == 1 and any(word in last(ran) for word in words)


def test_no_key_in_a_home_directory_can_be_read(way, tmp_path):
    key = tmp_path / "home" / ".ssh" / "id_rsa"
    key.parent.mkdir(parents=True)
    key.write_text("a key")
    for code in (
        f"open({str(key)!r}).read()",
        f"import os; os.listdir({str(key.parent)!r})",
        f"import os; os.symlink({str(key)!r}, 'x'); open('x').read()",
        f"import os; os.link({str(key)!r}, 'x')",
        f"import os; os.listdir({str(Path.home())!r} + '/.cache')",
        "import os; os.listdir('/proc/1')" if way == "landlock" else "open('/proc/1/root/x')",
        f"open({str(Path(__file__))!r})",
        "open('/etc/shadow')",
    ):
        assert refused(run_python(code)), code


def facts(path: Path) -> tuple[float, ...]:
    found = path.stat()
    return found.st_mode, found.st_uid, found.st_size, found.st_mtime_ns


def test_it_writes_its_own_directory_only(way, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    before = facts(mine)
    for code in (
        f"open({str(mine)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.truncate({str(mine)!r}, 0)",
        f"import os; os.unlink({str(mine)!r})",
        f"import os; os.rename({str(mine)!r}, 'x')",
        f"import os; os.rename('program.py', {str(tmp_path / 'new')!r})",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import os; os.chmod({str(mine)!r}, 0)",
        f"import os; os.chown({str(mine)!r}, 1, 1)",
        f"import os; os.utime({str(mine)!r}, (0, 0))",
        f"import os; os.setxattr({str(mine)!r}, 'user.x', b'')",
        "open('/tmp/metafocus-new', 'w')",
        "open('/dev/shm/metafocus-new', 'w')",
        "open('/var/tmp/metafocus-new', 'w')",
        "open('/metafocus-new', 'w')",
        "import os, sys; os.chmod(os.open(sys.prefix + '/pyvenv.cfg', os.O_RDONLY), 0o644)",
        "import sys; open(sys.prefix + '/pyvenv.cfg', 'a')",
    ):
        assert refused(run_python(code)), code
    assert mine.read_text() == "mine" and facts(mine) == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_it_wrote_is_gone(way):
    code = "import os\nos.mkdir('d'); open('d/f', 'w').close(); print(os.getcwd())"
    assert not Path(run_python(code).output.strip()).exists()
    assert run_python("import os; print(os.listdir('.'))").output == "['program.py']\n"


@pytest.mark.parametrize("deep", [1_500, 6_000])
def test_nested_folders_do_not_end_the_evaluation(way, deep):
    code = (
        "import os\nprint(os.getcwd(), flush=True)\n"
        f"for _ in range({deep}): os.mkdir('d'); os.chdir('d')\nprint('deep')"
    )
    ran = run_python(code, Limits(seconds=30))
    # Longer paths cannot be counted, so they are too much.
    assert ran.output.endswith("deep\n") or ran.stopped == "files"
    assert not Path(ran.output.splitlines()[0]).exists()


def test_folders_of_any_kind_are_removed(tmp_path):
    for name in ("nested", "closed"):
        with folders.temporary() as folder:
            inner = Path(folder, name)
            inner.mkdir()
            (inner / "removed-0").mkdir()
            (inner / "link").symlink_to(tmp_path)
            (inner / "file").write_text("x")
            Path(folder, "removed-0").mkdir()
            if name == "closed":
                (inner / "removed-0").chmod(0)
                inner.chmod(0)
        assert not Path(folder).exists()
    assert tmp_path.is_dir()  # a link is removed, not what it names


def test_wall_time(way):
    limits = Limits(seconds=1.0, cpu_seconds=20)
    for code in ("import time\nprint('a')\ntime.sleep(60)", "print('a')\nwhile True: pass"):
        ran = run_python(code, limits)
        assert ran.stopped == "wall time" and ran.output == "a\n" and 1 <= ran.seconds < 10
        assert ran.text == "a\n\n[stopped: limit of wall time]"
    # Closing the output is no way out, nor is refusing to be ended.
    for code in (
        "import os, time\nos.close(1); os.close(2)\ntime.sleep(60)",
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
    ):
        ran = run_python(code, limits)
        assert ran.stopped == "wall time" and ran.seconds < 10


def test_processor_time(way):
    ignored = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
    for code in ("while True: pass", ignored + "while True: pass"):
        ran = run_python(code, Limits(seconds=60, cpu_seconds=1))
        assert ran.stopped == "CPU time" and ran.seconds < 50 and ran.code < 0


def test_memory(way):
    limits = Limits(memory=1 << 28)
    ran = run_python("x = bytearray(1 << 29)", limits)
    assert ran.code == 1 and last(ran) == "MemoryError" and ran.seconds < 8
    assert run_python("print(len(bytearray(1 << 26)))", limits).output == f"{1 << 26}\n"
    ran = run_python("x = []\nwhile True: x.append(bytearray(1 << 20))", limits)
    assert ran.code == 1 and last(ran) == "MemoryError"


HIDDEN_MEMORY = {
    "memfd": "import os; os.memfd_create('x')",
    "shared memory": "from multiprocessing.shared_memory import SharedMemory\n"
    "SharedMemory('x', create=True, size=1 << 20)",
    "System V": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.shmget(0, 1 << 20, 0o1600) < 0: raise OSError(ctypes.get_errno(), 'shmget')",
}


@pytest.mark.parametrize("what", HIDDEN_MEMORY)
def test_memory_that_no_limit_counts_is_refused(way, what):
    assert refused(run_python(HIDDEN_MEMORY[what]))


def test_files_are_bounded_together(way):
    limits = Limits(disk=1 << 22, seconds=30)
    code = "for i in range(1000): open(f'f{i}', 'wb').write(bytes(1 << 20))"
    if way == "bubblewrap":
        code = f"try:\n    {code}\nexcept OSError as e:\n    print(e)"
        assert "No space left" in run_python(code, limits).output
    else:
        code = f"import time\n{code[:-1]}); time.sleep(0.02)"
        ran = run_python(code, limits)
        assert ran.stopped == "files" and ran.seconds < 20
    many = "i = 0\nwhile True:\n    i += 1; open(f'f{i}', 'w').close()"
    assert run_python(many, Limits(files=500, seconds=30)).stopped == "files"
    ran = run_python("open('f', 'wb').write(bytes(1 << 20))", Limits(file=1 << 16))
    assert ran.code != 0 and "File too large" in ran.output


REMOVED = """\
import mmap, os, time
kept = []
for i in range(20):
    file = open('f', 'w+b')
    file.write(bytes(1 << 20)); file.flush()
    kept.append(KEPT)
    os.unlink('f')
    del file
    time.sleep(0.05)
print(len(kept))
"""


@pytest.mark.parametrize("kept", ["file", "mmap.mmap(file.fileno(), 4096)"])
def test_files_without_a_name_are_counted_too(way, kept):
    """Removed, but open or mapped: the disk has them until the program ends."""
    code = REMOVED.replace("KEPT", kept)
    ran = run_python(code, Limits(disk=1 << 23, file=1 << 20, seconds=30))
    assert ran.stopped == "files" or "No space left" in ran.output
    ran = run_python(code, Limits(disk=1 << 25, file=1 << 20, seconds=30))
    assert ran.output == "20\n"


def test_the_program_is_the_first_to_end_where_memory_runs_out(way, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.folders.tempfile, "tempdir", str(tmp_path))
    thread = threading.Thread(target=run_python, args=("import time; time.sleep(2)",))
    thread.start()
    scores = set()
    while thread.is_alive():
        for process in running(tmp_path):
            try:
                scores.add((process, Path(f"/proc/{process}/oom_score_adj").read_text()))
            except OSError:
                continue
        time.sleep(0.02)
    last_of_each = dict(sorted(scores, key=lambda found: int(found[1])))
    assert set(last_of_each.values()) == {"1000\n"}
    lower = run_python("open('/proc/self/oom_score_adj', 'w').write('0')")
    assert refused(lower)


def test_a_flood_of_output(way):
    limits = Limits(output=1000, seconds=30)
    for code in (
        "while True: print('x' * 10_000)",
        "import sys\nwhile True: sys.stderr.write('x')",
        "print('x' * 50_000_000)",
    ):
        ran = run_python(code, limits)
        assert (ran.output, ran.stopped) == ("x" * 1000, "output") and ran.seconds < 20
    assert run_python("print('x' * 999)", limits).stopped == ""
    assert len(run_python("print('x' * 999)", limits).output) == 1000


LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
REFUSED = {
    "fork": "import os\nwhile True: os.fork()",
    "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "subprocess": "import subprocess\nsubprocess.run(['true'])",
    "multiprocessing": "import multiprocessing as m\nm.Process(target=print).start()",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "datagram": "import socket\nsocket.socket(type=socket.SOCK_DGRAM)",
    "unix": "import socket\nsocket.socket(socket.AF_UNIX)",
    "bind": "import socket\nsocket.socket().bind(('127.0.0.1', 0))",
    "urllib": "import urllib.request as u\nu.urlopen('http://127.0.0.1:{port}', timeout=2)",
    "kill": "import os\nos.kill({pid}, 0)",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill all": "import os\nos.kill(-1, 9)",
    "pidfd": "import os\nos.pidfd_open({pid})",
    "limits": "import resource as r\nr.prlimit({pid}, r.RLIMIT_NOFILE, (9, 9))",
    "priority": "import os\nos.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "affinity": "import os\nos.sched_setaffinity({pid}, [0])",
    "namespaces": "import os\nos.unshare(os.CLONE_NEWUSER)"
    if sys.version_info >= (3, 12)
    else LIBC + "if libc.unshare(1 << 28): raise PermissionError",
    "signal of a pipe": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {pid})",
    "signal of a pipe, as a structure": "import fcntl, os, struct\n"
    "fcntl.fcntl(os.pipe()[0], 15, struct.pack('ii', 1, {pid}))",
    "signal of a pipe, by ioctl": "import fcntl, os, struct\n"
    "fcntl.ioctl(os.pipe()[0], 0x8901, struct.pack('i', {pid}))",
    "lease": "import fcntl, os, sys\n"
    "fcntl.fcntl(os.open(sys.executable, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "attributes": "import fcntl, sys\nfcntl.ioctl(open(sys.executable), 0x40086602, bytes(8))",
    "file in a message": "import os, socket\n"
    "socket.send_fds(socket.socketpair()[0], [b'x'], [os.pipe()[0]])",
    "table of open files": LIBC + "import platform\n"
    "number = 56 if platform.machine() == 'x86_64' else 220\n"
    "if libc.syscall(number, 0x10900, 0, 0, 0, 0) < 0: raise PermissionError",
    "death signal": LIBC + "if libc.prctl(1, 0, 0, 0, 0): raise PermissionError",
    "capabilities": LIBC + "if libc.sethostname(b'x', 1): raise PermissionError",
}


@pytest.mark.parametrize("what", REFUSED)
def test_no_processes_no_network_and_no_other_processes(way, what):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        code = REFUSED[what].replace("{port}", str(server.getsockname()[1]))
        ran = run_python(code.replace("{pid}", str(os.getpid())))
        with pytest.raises(TimeoutError):
            server.accept()
    assert refused(ran) or "urlopen error" in ran.output, ran.output
    assert ran.seconds < 8
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


COMPILED = """\
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for _ in range(100):
    pid = libc.fork()
    if pid == 0:
        os.setsid()
        while True: pass
print(pid, ctypes.get_errno(), libc.socket(2, 1, 0), ctypes.get_errno())
libc.vfork.restype = ctypes.c_int
print(libc.syscall(435, bytes(88), 88), ctypes.get_errno())
"""


def test_compiled_code_cannot_do_it_either(way):
    """No child can call setsid and clear the death signal, because there is no child."""
    assert run_python(COMPILED).output == "-1 1 -1 1\n-1 38\n"


def running(folder: Path) -> list[str]:
    """The processes whose environment names a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder).encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def gone(folder: Path) -> bool:
    deadline = time.monotonic() + 10
    while running(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running(folder)


def test_a_killed_evaluation_leaves_no_program_running(way, tmp_path):
    code = (
        "from metafocus.evals.agentic import Limits, Walls, run_python, sandbox, walls\n"
        "found = walls()\n"  # its trials are processes too, and end before the word
        f"if {way == 'landlock'}: sandbox.walls = lambda: Walls(False, found.landlock, True)\n"
        "print('go', flush=True)\n"
        "run_python('import time; time.sleep(300)', Limits(seconds=300, cpu_seconds=300))"
    )
    # The programs get a directory here, and name it in their environment.
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"go\n"
    deadline = time.monotonic() + 20
    while len(running(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(running(tmp_path)) >= 2
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert gone(tmp_path)
    # Its directory stays, and the next evaluation removes it.
    (left,) = tmp_path.iterdir()
    folders.remove_left.__wrapped__(str(tmp_path))
    assert not left.exists()


KILLED = """\
import os, signal, time
from metafocus.evals.agentic import Limits, Walls, run_python, sandbox, walls
if LANDLOCK: sandbox.walls = lambda: Walls(False, walls().landlock, True)
else: walls()
for i in range(20):
    pid = os.fork()
    if not pid:
        run_python('import time; time.sleep(300)', Limits(seconds=300, cpu_seconds=300))
    time.sleep(0.01 * i)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def test_an_evaluation_that_is_killed_at_any_moment_leaves_no_program(way, tmp_path):
    """While the program starts, too: every 10 ms of the first 200."""
    code = KILLED.replace("LANDLOCK", str(way == "landlock"))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    assert gone(tmp_path)


def test_a_program_whose_evaluation_is_gone_already_does_not_begin(way, tmp_path):
    """Killed before the signal is set: nobody reads the output any more."""
    (tmp_path / "program.py").write_text("import sys; sys.exit(7)")
    command = sandbox._command(str(tmp_path), Limits(), way)
    reader, writer = os.pipe()
    for code in (7, 1):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=writer, stderr=writer)
        assert process.wait(30) == code
        if code == 7:
            os.close(reader)
    os.close(writer)


def test_only_directories_that_nobody_uses_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.tempfile, "tempdir", str(tmp_path))
    left, other = tmp_path / "metafocus-tool-left", tmp_path / "other"
    for folder in (left, other):
        (folder / "inner").mkdir(parents=True)
    link = tmp_path / "metafocus-tool-link"
    link.symlink_to(other)
    with folders.temporary() as first:
        assert not left.exists()
        left.mkdir()  # from now on this process looks no more
        with folders.temporary() as second:
            # Another evaluation starts; a lock also counts within one process.
            folders.remove_left.__wrapped__(str(tmp_path))
            assert Path(first).is_dir() and Path(second).is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metafocus-tool-link", "other"]
    assert (other / "inner").is_dir()


def test_a_directory_that_is_removed_before_its_lock_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.tempfile, "tempdir", str(tmp_path))
    real, made = folders.tempfile.mkdtemp, []

    def unlucky(**options):
        made.append(real(**options))
        if len(made) == 1:
            folders.remove_left.__wrapped__(str(tmp_path))
        return made[-1]

    monkeypatch.setattr(folders.tempfile, "mkdtemp", unlucky)
    with folders.temporary() as folder:
        assert folder == made[1] and Path(folder).is_dir() and not Path(made[0]).exists()


def test_an_interrupted_evaluation_leaves_no_program_behind(way, tmp_path, monkeypatch):
    """Whatever happens while it waits: here an exception in the reading of the output."""
    monkeypatch.setattr(sandbox.folders.tempfile, "tempdir", str(tmp_path))

    def fails(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_read", fails)
        with pytest.raises(KeyboardInterrupt):
            run_python("while True: pass")
    assert gone(tmp_path) and list(tmp_path.iterdir()) == []


def test_calls_beside_each_other(way):
    outputs = {}

    def call(i):
        outputs[i] = run_python(f"print({i})").output

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {i: f"{i}\n" for i in range(4)}


def test_without_a_wall_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sandbox, "walls", lambda: Walls(False, 0, True))
    with pytest.raises(DataError, match=r"no wall around .* install bubblewrap .* unsafe_tools"):
        run_python("print(1)")
    monkeypatch.setattr(sandbox, "walls", lambda: Walls(False, 7, False))
    with pytest.raises(DataError, match="no wall around"):
        run_python("print(1)")
    ran = run_python("import os; print(os.path.exists('/proc/self'))", unsafe=True)
    assert ran.output == "True\n"


def test_bubblewrap_counts_only_if_it_works(monkeypatch, tmp_path):
    """Installed, but this user may make no namespaces: as in many containers."""
    (tmp_path / "bwrap").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert shutil.which("bwrap") == str(tmp_path / "bwrap")
    assert not walls.__wrapped__().bubblewrap


def test_bad_limits(monkeypatch):
    with pytest.raises(DataError, match="seconds must be positive, got 0"):
        Limits(seconds=0)
    with pytest.raises(DataError, match="memory must be an integer >= 1, got -1"):
        Limits(memory=-1)
    with pytest.raises(DataError, match=r"cpu_seconds must be an integer .*got 0\.5"):
        Limits(cpu_seconds=0.5)
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(DataError, match="needs Linux"):
        run_python("print(1)")
