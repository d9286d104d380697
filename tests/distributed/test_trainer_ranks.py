"""`FocusTrainer` on two processes trains, saves and resumes as one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import rank_pool as pool
import torch
import training_cases as cases
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

# One worker: the processes of the fixture start once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]

SCRIPT = Path(__file__).parent / "training_cases.py"
NAMES = list(cases.cases(Path()))
TRAINED = [name for name in NAMES if not name.endswith("resumed")]
RESUMED = [name for name in NAMES if name.endswith("resumed")]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """The folder with what each rank found in the cases that are asked for."""
    folder = tmp_path_factory.mktemp("training")
    here = [item for item in request.session.items if item.path == Path(__file__)]
    chosen = [item.callspec.params["name"] for item in here if hasattr(item, "callspec")]
    command = [sys.executable, str(SCRIPT), str(folder), *chosen]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2400, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def final(results: Path, run: str) -> dict[str, torch.Tensor]:
    """The weights of a last save, as plain transformers loads them."""
    folder = results / run / "final"
    assert load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return dict(model.named_parameters())


def same(found, want, tolerance: float) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_reach_what_one_reaches(results, name):
    way, method, tie = name.rsplit(", ", 2)
    got = [pool.load(name, results, rank) for rank in (0, 1)]
    if way.startswith("fsdp") and method == "second order":
        for found in got:
            assert found["error"] == "ProblemError" and "--sharding parametrised" in found["text"]
        return
    alone = pool.load(f"{method}, {tie}", results, "alone")
    assert "error" not in alone, alone
    # Half types round otherwise where FSDP2 casts weights than where autocast casts operands.
    half = method == "bf16"
    for found in got:
        assert "error" not in found, found
        assert abs(found["eval"] - alone["eval"]) < (1e-2 if half else 1e-6)
        for entry, wanted in zip(found["logs"], alone["logs"], strict=True):
            assert abs(entry["loss"] - wanted["loss"]) < (1e-2 if half else 1e-6)
    if not half:
        # Adam divides by the size of a gradient, which raises its rounding.
        runs = f"{way}, {method}, {tie == 'tied'}", f"alone, {method}, {tie == 'tied'}"
        same(*(final(results, run) for run in runs), 1e-11)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_it_reaches_the_same(results, name):
    for rank in (0, 1):
        found = pool.load(name, results, rank)
        assert "error" not in found, found
    way = name.removesuffix(", resumed")
    if way in cases.MORE:
        for rank in range(4):
            found = pool.load(f"{way}, resumed by four", results, rank)
            assert "error" not in found, found
        first = pool.load(f"{way}, resumed by four", results, 0)
        assert "saved by 2 processes and is resumed by 4" in first["warned"]
        want = final(results, "alone, first order, True")
        same(final(results, f"{way}, resumed by four"), want, 1e-11)
    want = final(results, "alone, first order, True")
    same(final(results, f"{way}, saved"), want, 1e-11)
    if way in ("ddp", "parametrised"):
        alone = pool.load(name, results, "alone")
        assert "error" not in alone, alone
        same(final(results, f"{way}, resumed alone"), want, 1e-11)
        assert "saved by 2 processes and is resumed by 1" in alone["warned"]
