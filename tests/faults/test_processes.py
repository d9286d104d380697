"""Runs that are killed at a write, stopped by a signal, or meet another run in their directory."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "fault_script.py"


def report(what: str, folder: Path):
    """Run the script, and return what it saw."""
    path = os.pathsep.join(
        [str(SCRIPT.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT), what, str(folder)],
        capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text())


def test_killed_at_every_write(tmp_path):
    """Before each write that Python sees, and inside files that native code writes."""
    found = report("writes", tmp_path)
    assert len(found) > 30
    for case in found:
        assert case["killed"] in (-9, -25), case
        # What has the name of a checkpoint is whole, and one is kept.
        assert case["damage"] == [None] * len(case["left"]) and len(case["left"]) <= 2, case
        # The same command goes on to the same weights, and leaves nothing behind.
        assert case["code"] == 0 and case["same"] and case["rest"] == [], case
    # Kills came before the first checkpoint, between two, and after the last.
    assert {case["newest"] for case in found} == {None, "checkpoint-1", "checkpoint-2"}


def test_signals(tmp_path):
    found = report("signals", tmp_path)
    for name, code in (("SIGINT", 130), ("SIGTERM", 143)):
        case = found[name]
        assert (case["code"], case["left"], case["damage"]) == (code, ["checkpoint-1"], [None])
        # transformers shows how far it is with writing.
        lines = [line for line in case["stderr"].splitlines() if line and "Writing" not in line]
        assert lines == [
            f"metafocus: stopped by {name}; checkpoint-1 is saved. To go on, give the same command "
            "with --resume_from_checkpoint true (in Python: train(resume_from_checkpoint=True))."
        ]
    case = found["twice"]
    # The step would have taken 30 s.
    assert (case["code"], case["left"]) == (143, []) and case["seconds"] < 10
    assert case["stderr"] == ""


def test_a_second_run_is_refused_and_a_stale_lock_taken_over(tmp_path):
    found = report("two", tmp_path)
    place = re.escape(repr(str(tmp_path / "run")))
    assert re.fullmatch(
        rf"output_dir={place} is in use by process {found['pid']} on {socket.gethostname()}: "
        r"name another directory, or wait until that run has ended\.",
        found["said"],
    )
    assert {".run.json", ".run.lock"} <= set(found["left"])
    assert found["code"] == 0


def test_what_one_rank_meets_all_ranks_decide(tmp_path):
    found = report("ranks", tmp_path)
    assert found["codes"] == [0, 0]
    facts = [json.loads((tmp_path / f"poison{rank}.json").read_text()) for rank in range(2)]
    assert facts[0] == facts[1]
    assert facts[0]["moved"] == [True, False, True, True] and facts[0]["skipped"] == 1
    # Only the second rank has the signal: both save one checkpoint together and end alike.
    assert found["stopped"] == [143, 143]
    assert (found["left"], found["damage"]) == (["checkpoint-2"], [None])


def test_a_stalled_rank_ends_the_run_by_ddp_timeout(tmp_path):
    found = report("stalled", tmp_path)
    assert found["codes"] == [2, -9] and found["newest"] == "checkpoint-2"
    assert 8 <= found["seconds"] < 90
    assert found["said"].startswith(
        "rank 0 has waited for the other ranks longer than ddp_timeout=8 s after step 2: one of "
    )
