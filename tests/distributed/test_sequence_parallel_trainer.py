"""Trainers whose ranks share sequences train as one process with more micro-batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sequence_trainer_script import METHODS
from trainer_script import arguments, tiny, trainer

from metafocus.errors import ProblemError
from metafocus.trainer.shared_batches import with_shared_batches

pytestmark = pytest.mark.xdist_group("sequence parallel trainer")

SCRIPT = Path(__file__).parent / "sequence_trainer_script.py"


@pytest.fixture(scope="module", params=[(2, 2), (4, 2), (4, 4)], ids=str)
def facts(request, tmp_path_factory):
    """What one process found, and what each rank found: of how many, and how many share."""
    ranks, size = request.param
    folder = tmp_path_factory.mktemp("trainers")
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(ranks), str(size), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    names = ["alone", *(f"rank{r}" for r in range(ranks))]
    return [torch.load(folder / f"{name}.pt", weights_only=False) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_weights_logs_and_evaluation_are_those_of_one_process(facts, name):
    alone, *ranks = facts
    for rank in ranks:
        found, expected = rank[name]["weights"], alone[name]["weights"]
        # AdamW divides by small numbers.
        assert ((found - expected).norm() / expected.norm()).item() < 1e-12
        assert torch.equal(found, ranks[0][name]["weights"])
        # Held-out and logged losses are summed in float32.
        assert rank[name]["heldout"] == pytest.approx(alone[name]["heldout"], rel=1e-6)
        for ours, theirs in zip(rank[name]["logs"], alone[name]["logs"], strict=True):
            ours, theirs = ({**log, "inner_time_share": 0.0} for log in (ours, theirs))
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "name"), [("fsdp", "focusft"), ("parametrised", "second order")])
def test_beside_sharded_weights(facts, way, name):
    """accelerate's own FSDP2 to first order, `--sharding parametrised` to the second."""
    alone, *ranks = facts
    for rank in ranks:
        assert rank[way]["sharded"]
        found, expected = rank[way]["weights"], alone[name]["weights"]
        assert ((found - expected).norm() / expected.norm()).item() < 1e-12
        assert rank[way]["heldout"] == pytest.approx(alone[name]["heldout"], rel=1e-6)


@pytest.mark.slow
def test_evaluation_may_adapt_to_each_prompt(facts):
    alone, *ranks = facts
    for rank in ranks:
        assert rank["prompts"] == pytest.approx(alone["prompts"], rel=1e-6)


@pytest.mark.slow
def test_what_is_refused_on_every_rank(facts):
    _, *ranks = facts
    for rank in ranks:
        found = rank["refused"]
        assert "evaluates losses only" in found["compute_metrics"]
        assert "meta_loss_factory is not supported" in found["factory"]
        assert "size=3 does not divide" in found["size"]
        assert "needs a data set with a length" in found["stream"]


def test_a_process_alone_is_refused(tmp_path):
    with pytest.raises(ProblemError, match=r"size=2 ranks.*torchrun"):
        trainer(tiny(), tmp_path, sequence_parallel=2)
    with pytest.raises(ProblemError, match="sequence_parallel must be finite and >= 1, got 0"):
        arguments(tmp_path, sequence_parallel=0)


def test_sequence_parallelism_of_accelerate_is_refused(tmp_path):
    from accelerate.parallelism_config import ParallelismConfig

    from metafocus.trainer.shared_batches import check_sequence_parallel

    args = arguments(tmp_path)
    args.parallelism_config = ParallelismConfig(sp_size=2)
    with pytest.raises(ProblemError, match=r"DeepSpeed runs.*--sequence_parallel 2"):
        check_sequence_parallel(1, args, None)


def test_compilation_is_refused(tmp_path):
    from metafocus.trainer.shared_batches import check_sequence_parallel

    args = arguments(tmp_path)
    args.torch_compile = True
    with pytest.raises(ProblemError, match="torch_compile is not supported"):
        check_sequence_parallel(2, args, None)


def test_ranks_of_a_group_get_the_same_batches():
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

    def batches(ranks: int, rank: int, size: int) -> list[list[int]]:
        whole = BatchSampler(SequentialSampler(range(10)), 2, drop_last=False)
        sampler = BatchSamplerShard(whole, ranks, rank)
        loader = DataLoader(list(range(10)), batch_sampler=sampler)
        return [x.tolist() for x in with_shared_batches(loader, size, ranks, rank)]

    for rank in range(4):
        assert batches(4, rank, 2) == batches(2, rank // 2, 1)
    assert batches(2, 1, 2) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
