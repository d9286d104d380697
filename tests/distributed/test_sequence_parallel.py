"""Ranks that share sequences compute what one process computes, in every order of derivative."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sequence_script import ARCHITECTURES, ATTENTION, GROUPS, PARTS, REFUSED, SHARDED, WHOLE

from metafocus.attention import ulysses_attention
from metafocus.errors import ProblemError
from metafocus.masks import Spans
from metafocus.parallel import exchanged, replicated, sequence_group, share, summed

# One worker: the processes of a part start once.
pytestmark = pytest.mark.xdist_group("sequence parallel")

SCRIPT = Path(__file__).parent / "sequence_script.py"
EXACT = 1e-12
"""Ranks add in another order than one process; all of it is float64."""

TOLERANCES = {
    # A difference of gradients over a step of 1e-4 loses four digits of them.
    "finite differences": 1e-9,
    # bfloat16 holds 8 bits, and sums over ranks round once more.
    "bfloat16, first order": 2e-2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function that runs a part alone and on some ranks, once."""
    kept = {}

    def results(part: str, ranks: int):
        if (part, ranks) not in kept:
            folder = tmp_path_factory.mktemp(part)
            command = [sys.executable, "-W", "ignore", str(SCRIPT), str(ranks), str(folder), part]
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
            assert done.returncode == 0, done.stderr
            names = ["alone", *(f"rank{r}" for r in range(ranks))]
            kept[part, ranks] = [torch.load(folder / f"{name}.pt") for name in names]
        return kept[part, ranks]

    return results


def relative(a, b) -> float:
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


def check(alone, ranks, name):
    """Compare every tensor of a case: attention in shares, all else on each rank."""
    bound = TOLERANCES.get(name, EXACT)
    for key, expected in alone[name].items():
        if name in ATTENTION:
            assert relative(torch.cat([r[name][key] for r in ranks], 2), expected) < bound, key
            continue
        for rank in ranks:
            if expected.norm() == 0:
                assert rank[name][key].norm() == 0, key
            elif expected.numel():
                assert relative(rank[name][key], expected) < bound, key
        # What the ranks hold in common may not drift apart.
        assert all(torch.equal(rank[name][key], ranks[0][name][key]) for rank in ranks), key


def test_two_ranks_are_one_process(run):
    """Attention of every kind of heads, and FocuSFT with its own mask, to the second order."""
    alone, *ranks = run("quick", 2)
    for name in PARTS["quick"]:
        check(alone, ranks, name)


def test_second_order_differs_from_first(run):
    alone, *_ = run("quick", 2)
    first, second = (alone[f"turns, {order} order"]["gradient"] for order in ("first", "second"))
    assert relative(first, second) > 1e-2


def test_what_cannot_be_shared_is_refused(run):
    expected = {
        "heads": "2 ranks cannot share the 3 query heads",
        "vmap": "vmap .* is not supported",
        "batched gradients": "Batching rule not implemented",
        "batched sums": "Batching rule not implemented",
        "jvp": "forward mode .* is not supported",
        "hvp_forward": "forward mode .* is not supported",
        "eager": "attention takes no spans",
        "dropout": "without attention dropout",
        "different batches": "were given different batches",
        "different lengths": "were given different batches",
        "different starts": "a generator of the same seed",
        "fsdp2": "average_over_groups",
        "parametrised": "parametrised without this sequence_group",
        "mixing tokens": "in shares otherwise than as a whole",
        "size": "size=3 does not divide the 2 ranks",
    }
    assert set(expected) == set(REFUSED)
    _, *ranks = run("refused", 2)
    for rank in ranks:
        for name, pattern in expected.items():
            (found,) = rank[name].values()
            assert re.search(pattern, found), (name, found)


def test_a_rank_that_waits_in_vain_ends_with_an_error(run):
    _, first, second = run("absent", 2)
    assert re.search("(?i)timed? ?out", first["absent"]["RuntimeError"])
    assert second["absent"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", PARTS["policies"])
def test_mask_policies(run, name, ranks):
    alone, *others = run("policies", ranks)
    check(alone, others, name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", WHOLE)
def test_settings(run, name, ranks):
    """Packing, padding, windows, kernels, adapters, estimators, precision."""
    alone, *others = run("settings", ranks)
    check(alone, others, name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SHARDED)
def test_weights_that_are_sharded_too(run, name, ranks):
    """FSDP2's hooks to first order, parametrised weights to the second."""
    alone, *others = run("sharded", ranks)
    check(alone, others, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS)
def test_gradients_are_averaged_over_groups(run, name):
    alone, *ranks = run("groups", 4)
    check(alone, ranks, name)


@pytest.mark.slow
def test_architectures_share_exactly_or_are_refused(run):
    alone, *ranks = run("architectures", 2)
    shared = 0
    for name in ARCHITECTURES:
        words = [rank[name].get("refused") for rank in ranks]
        if words[0] is not None:
            assert words[0] == words[1]
            assert re.search("cannot share|takes no explicit mask", words[0]), (name, words)
            continue
        shared += 1
        for rank in ranks:
            for key, expected in alone[name].items():
                # Norms of transformers round to float32, and turn a last bit into 1e-8.
                assert relative(rank[name][key], expected) < 1e-6, (name, key)
    assert shared > 30


@pytest.mark.slow
def test_attention_on_four_ranks(run):
    alone, *ranks = run("quick", 4)
    for name in PARTS["quick"]:
        check(alone, ranks, name)


def test_alone_nothing_is_exchanged():
    x = torch.arange(4.0)
    assert sequence_group(1) is None
    for same in (replicated(x, None), summed(x, None), share(x, None, 0)):
        assert same is x
    assert exchanged(x[None], None, scatter=0, gather=1).shape == (1, 4)


def test_a_process_alone_cannot_share():
    with pytest.raises(ProblemError, match=r"size=2.*torchrun"):
        sequence_group(2)
    with pytest.raises(ProblemError, match="size must be an integer >= 1"):
        sequence_group(0)


def test_spans_of_another_length_are_refused():
    """A model that drops `sequence_group` on its way to attention is not silently wrong."""
    q = torch.randn(1, 2, 4, 8)
    index = torch.arange(8)[None]
    with pytest.raises(ProblemError, match=r"spans are those of 8 tokens.*sequence_group"):
        ulysses_attention(q, q, q, Spans(torch.zeros_like(index), index + 1), None)
