"""Every limit of the Python tool, with the kernel's walls and without them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from metafocus.errors import DataError
from metafocus.evals.agentic import Limits, Ran, run_python, sandbox, walls

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tool needs Linux")


def guard(path, **lines):
    """A copy of the guard without some of its calls."""
    text = Path(sandbox._PYTHON[-1]).read_text()
    for line in lines.values():
        assert f"\n        {line}\n" in text
        text = text.replace(f"\n        {line}\n", "\n")
    path.write_text(text)
    return (*sandbox._PYTHON[:-1], str(path))


@pytest.fixture(params=["namespaces", "none"])
def way(request, monkeypatch, tmp_path):
    """As this kernel lets us, and as one without namespaces for users would."""
    if request.param == "none":
        found = guard(tmp_path / "guard.py", a="enter_namespaces()")
        monkeypatch.setattr(sandbox, "_PYTHON", found)
    elif not walls().namespaces:
        pytest.skip("this user may make no namespaces")
    return request.param


def last(ran: Ran) -> str:
    return ran.output.strip().splitlines()[-1]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_output_and_errors(way):
    assert run_python("print(6 * 7)") == Ran("42\n", 0, "", pytest.approx(0, abs=10))
    assert run_python("").output == ""
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
    assert ran.output == "before\n" and ran.code < 0 and ran.stopped == ""


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
    # What is written is gone, also what cannot be read.
    code = (
        "import os\nos.mkdir('d'); open('d/f', 'w').close(); os.chmod('d', 0); print(os.getcwd())"
    )
    assert not Path(run_python(code).output.strip()).exists()
    assert run_python("import os; print(os.listdir('.'))").output == "['program.py']\n"
    if way == "namespaces":
        assert run_python("import os; print(os.getpid())").output == "1\n"


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
    ran = run_python("while True: pass", Limits(seconds=60, cpu_seconds=1))
    assert ran.stopped == "CPU time" and ran.seconds < 50 and ran.code < 0


def test_memory(way):
    limits = Limits(memory=1 << 28)
    ran = run_python("x = bytearray(1 << 29)", limits)
    assert ran.code == 1 and last(ran) == "MemoryError" and ran.seconds < 8
    assert run_python("print(len(bytearray(1 << 26)))", limits).output == f"{1 << 26}\n"
    ran = run_python("x = []\nwhile True: x.append(bytearray(1 << 20))", limits)
    assert ran.code == 1 and last(ran) == "MemoryError"


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


def test_large_files(way):
    ran = run_python("open('f', 'wb').write(bytes(1 << 20))", Limits(file=1 << 16))
    assert ran.code != 0 and "File too large" in ran.output


REFUSED = {
    "fork": "import os\nwhile True: os.fork()",
    "subprocess": "import subprocess\nsubprocess.run(['true'])",
    "system": "import os\nos.system('true')",
    "multiprocessing": "import multiprocessing as m\nm.Process(target=print).start()",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "bind": "import socket\nsocket.socket().bind(('127.0.0.1', 0))",
    "names": "import socket\nsocket.getaddrinfo('localhost', 80)",
    "urllib": "import urllib.request as u\nu.urlopen('http://127.0.0.1:{port}', timeout=2)",
    "kill": "import os\nos.kill(os.getppid(), 0)",
}


@pytest.mark.parametrize("what", REFUSED)
def test_no_processes_and_no_network(way, what):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        ran = run_python(REFUSED[what].replace("{port}", str(server.getsockname()[1])))
        with pytest.raises(TimeoutError):
            server.accept()
    assert ran.code == 1 and ran.seconds < 8
    assert "PermissionError" in ran.output or "urlopen error" in ran.output


COMPILED = """\
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for _ in range(100):
    pid = libc.fork()
    if pid == 0:
        while True: pass
print(pid, ctypes.get_errno(), libc.socket(2, 1, 0), ctypes.get_errno())
"""


def test_the_kernel_refuses_what_no_hook_sees(way):
    if not walls().system_calls:
        pytest.skip("this kernel takes no filter")
    assert run_python(COMPILED).output == "-1 1 -1 1\n"
    threads = "import threading\nt = threading.Thread(target=print, args=(7,))\nt.start(); t.join()"
    assert run_python(threads).output == "7\n"


def test_without_a_filter_nothing_outlives_the_program(monkeypatch, tmp_path):
    """Processes that leave the group die with the namespace; the network is not there."""
    if not walls().namespaces:
        pytest.skip("this user may make no namespaces")
    bare = guard(tmp_path / "guard.py", a="refuse_system_calls()", b="sys.addaudithook(_refuse)")
    monkeypatch.setattr(sandbox, "_PYTHON", bare)
    marker = f"metafocus-test-{os.getpid()}"
    code = (
        "import os, sys\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        f"        os.execl(sys.executable, '{marker}', '-c', 'import time; time.sleep(300)')\n"
        "    os._exit(0)\n"
        "print('parent', flush=True)\nwhile True: pass"
    )
    ran = run_python(code, Limits(seconds=2))
    assert ran.output == "parent\n" and ran.stopped == "wall time"
    assert not named(marker)
    bomb = "import os\nprint('go', flush=True)\nfor _ in range(6): os.fork()\nwhile True: pass"
    assert run_python(bomb, Limits(seconds=1)).stopped == "wall time"
    ran = run_python("import socket\nsocket.create_connection(('192.0.2.1', 80), 2)")
    assert "unreachable" in ran.output


def named(marker: str) -> list[str]:
    time.sleep(0.2)
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def test_an_interrupted_evaluation_leaves_no_program_behind(tmp_path):
    """Whatever happens while it waits: here an exception in the reading of the output."""
    ids = []
    real = subprocess.Popen

    class Watched(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            ids.append(self.pid)

    def fails(process, limits):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox.subprocess, "Popen", Watched)
        patch.setattr(sandbox, "_read", fails)
        with pytest.raises(KeyboardInterrupt):
            run_python("while True: pass")
    assert ids and not any(map(alive, ids))


def test_calls_beside_each_other():
    outputs = {}

    def call(i):
        outputs[i] = run_python(f"print({i})").output

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {i: f"{i}\n" for i in range(4)}


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
