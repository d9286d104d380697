"""Tasks shared by processes: the mean over all of them, whatever each process has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import rank_pool as pool
import task_cases as cases

# One worker: the processes of the fixture start once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]

SCRIPT = Path(__file__).parent / "task_cases.py"
NAMES = [name for name in cases.CASES if not name.endswith("beside")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_all_tasks(results, name):
    want = pool.load(name.split(", ")[0], results, "alone")
    # Ten steps of CG amplify rounding, and fewer tasks at once are rounded otherwise (1e-9 on some
    # machines). A wrong share of a rank's tasks would be an error of some percent.
    tolerance = 1e-6 if name.startswith("implicit") else 1e-13
    for rank in (0, 1):
        found = pool.load(name, results, rank)
        assert "error" not in found, found
        assert abs(found.get("loss", want["loss"]) - want["loss"]) < 1e-14
        for key, value in want["grads"].items():
            assert (found["grads"][key] - value).norm() <= tolerance * value.norm(), key


@pytest.mark.parametrize("how", cases.HOW)
def test_what_only_some_ranks_need(results, how):
    """Ranks whose tasks use different entries of outer; and a gradient by a rank's own data."""
    want = pool.load("own gains", results, "alone")
    assert "error" not in want, want
    for rank, own in ((0, slice(4)), (1, slice(4, None))):
        found = pool.load(f"own gains, {how}", results, rank)
        assert "error" not in found, found
        for key in ("first", "second", "hypergrad"):
            for a, b in zip(found[key], want[key], strict=True):
                assert (a - b).norm() <= 1e-13 * b.norm(), key
        assert (found["data"] - want["data"][own]).norm() <= 1e-13 * want["data"].norm()


def test_a_gradient_that_no_rank_would_sum_is_refused(results):
    for rank in (0, 1):
        found = pool.load("outside", results, rank)
        assert found["error"] == "ProblemError" and "neither in outer nor" in found["text"]


@pytest.mark.parametrize("estimator", cases.ESTIMATORS)
def test_the_module_of_a_ddp_wrapper_is_refused(results, estimator):
    for rank in (0, 1):
        found = pool.load(f"{estimator}, beside", results, rank)
        assert found["error"] == "ProblemError" and "through(ddp" in found["text"]


def test_a_process_without_tasks_is_refused_on_all(results):
    for rank in (0, 1):
        found = pool.load("without tasks", results, rank)
        assert found["error"] == "ProblemError" and "the ranks have [8, 0] tasks" in found["text"]


@pytest.mark.parametrize("estimator", cases.OWN)
def test_an_own_loop_over_parametrised_weights(results, estimator):
    """Rows that the processes do not divide, and a process without any row of a weight."""
    want = pool.load(f"own, {estimator}", results, "alone")
    assert "error" not in want, want
    for rank in (0, 1):
        found = pool.load(f"own, {estimator}", results, rank)
        assert "error" not in found, found
        for key, value in want["grads"].items():
            assert (found["grads"][key] - value).norm() <= 1e-12 * value.norm(), key


def test_fast_weights_that_are_parts_are_refused(results):
    for rank in (0, 1):
        found = pool.load("copies", results, rank)
        assert found["error"] == "ProblemError"
        assert "a part of a weight that parametrise has sharded" in found["text"]
