"""Two processes compute what one process computes, and the inner loop sends nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from trainer_script import ESTIMATORS, METHODS, tiny

from metafocus.errors import ProblemError
from metafocus.sharding import sharding_of
from metafocus.trainer.distributed import through

# One worker: the processes of the fixture start once.
pytestmark = pytest.mark.xdist_group("distributed")

SCRIPT = Path(__file__).parent / "trainer_script.py"


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What one process found, and what each of two found that trained together."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(SCRIPT), "ranks", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "report.json").read_text())["codes"] == [0, 0, 0], done.stderr
    names = ("alone", "rank0", "rank1")
    return [torch.load(folder / f"{name}.pt", weights_only=False) for name in names]


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_ddp_gradient_is_the_mean_and_the_inner_loop_is_silent(facts, name):
    alone, *both = facts
    first, second = alone[f"grad {name}"]
    assert relative(first, second) > 0.1
    for rank in both:
        (before_backward, after_backward), found = rank[f"grad {name}"]
        assert before_backward == 0 and after_backward == 1
        assert relative(found, (first + second) / 2) < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "graph", "checkpointing"])
def test_fsdp_gradient_is_the_mean(facts, name):
    alone, *both = facts
    first, second = alone["grad graph" if name == "graph" else "grad first"]
    # Sharded models run the layers below the fast weights in every inner step, so sums have
    # another order; transformers' norms round to float32 and turn a last bit into 1e-8 there.
    bound = 1e-6 if name == "graph" else 1e-14
    for rank in both:
        assert relative(rank[f"fsdp {name}"], (first + second) / 2) < bound


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_train_as_one_process_with_twice_the_accumulation(facts, name):
    """Token weights, data order, starts, clipping: all of it, and the evaluation."""
    alone, *both = facts
    for rank in both:
        assert relative(rank[name]["weights"], alone[name]["weights"]) < 1e-13
        # Losses are logged through float32.
        assert rank[name]["eval"] == pytest.approx(alone[name]["eval"], rel=1e-6)
        for ours, theirs in zip(rank[name]["logs"], alone[name]["logs"], strict=True):
            ours, theirs = ({**log, "inner_time_share": 0.0} for log in (ours, theirs))
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert torch.equal(both[0][name]["weights"], both[1][name]["weights"])


@pytest.mark.slow
def test_a_rank_without_answers_neither_hangs_nor_skews(facts):
    alone, *both = facts
    assert alone["no answers"].norm() > 0
    for rank in both:
        assert relative(rank["no answers"], alone["no answers"]) < 1e-14


def test_data_parallel_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ProblemError, match="torchrun"):
        through(nn.DataParallel(model), model, torch.ones(2))


def test_without_a_wrapper_nothing_is_between():
    model = tiny()
    assert through(model, lambda x: x + 1, torch.tensor(1)).item() == 2
    assert "forward" not in model.__dict__ and not sharding_of(model)
