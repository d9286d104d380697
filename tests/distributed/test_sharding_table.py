"""Every layout of weights gives the gradient of one process, or a refusal with the way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import rank_pool as pool
import sharding_table as table

# One worker: the processes of the fixture start once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]

SCRIPT = Path(__file__).parent / "sharding_table.py"
SECOND = {"unrolled", "recompute", "forward", "implicit", "penalty"}


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """The folder with what each rank found in the cells that are asked for."""
    folder = tmp_path_factory.mktemp("table")
    here = [item for item in request.session.items if item.path == Path(__file__)]
    chosen = [item.callspec.params["name"] for item in here if hasattr(item, "callspec")]
    command = [sys.executable, str(SCRIPT), str(folder), *chosen]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", table.CELLS)
def test_a_cell_is_exact_or_refused(results, name):
    layout, tie, method = name.rsplit(", ", 2)
    got = [pool.load(name, results, rank) for rank in (0, 1)]
    sharded = layout.startswith(("accelerate", "own"))
    allowed = layout == "own, kept" and method == "unrolled"
    if sharded and method in SECOND and not allowed:
        for found in got:
            assert found["error"] == "ProblemError"
            assert "parametrise(model, mesh)" in found["text"] and "FSDP2" in found["text"]
        return
    alone = [pool.load(f"{tie}, {method}, {rank}", results, "alone") for rank in (0, 1)]
    for rank, found in enumerate(got):
        assert "error" not in found, found
        assert abs(found["loss"] - alone[rank]["loss"]) < 1e-12
        # The head sees the scored positions and no other ones.
        assert found["head"] == alone[rank]["head"]
        for key, value in found["grads"].items():
            want = (alone[0]["grads"][key] + alone[1]["grads"][key]) / 2
            assert (value - want).norm() <= 1e-12 * want.norm(), key
        assert found["grads"].keys() == alone[rank]["grads"].keys()


def test_the_references_differ(results):
    """Exactness says something only if the batches and the estimators do not agree anyway."""
    for tie in ("tied", "untied"):
        first = pool.load(f"{tie}, first order, 0", results, "alone")["grads"]
        for other in (f"{tie}, first order, 1", f"{tie}, recompute, 0", f"{tie}, implicit, 0"):
            grads = pool.load(other, results, "alone")["grads"]
            assert max((grads[k] - first[k]).norm() / first[k].norm() for k in first) > 1e-3
