"""Arguments of a wrong kind are refused where they are passed, by their name."""

from __future__ import annotations

import pytest
import torch

import metafocus as mf
from metafocus.errors import ProblemError


def loss(fast, slow, data):
    return ((fast["w"] - data) ** 2).sum()


PROBLEM = mf.Problem(loss, loss)
SOLVER = mf.SGD(0.1, steps=2)
META = mf.bilevel(PROBLEM, solver=SOLVER, estimator=mf.Unrolled())
OUTER = {"w": torch.ones(2)}
EPISODE = mf.Episode(torch.zeros(2), torch.ones(2))
ALGORITHMS = [
    getattr(mf.algorithms, x) for x in ("SOBA", "SABA", "StocBiO", "AmIGO", "BOME", "F2SA")
]

CASES = {
    "fetch, an object": ("fetch must", lambda: mf.Batches([1, 2], 2)),
    "fetch, no argument": ("fetch must", lambda: mf.Batches(lambda: 1, 2)),
    "proximal": ("inner_loss must", lambda: mf.proximal("loss", 1.0)),
    "micro_batches": ("loss must", lambda: mf.micro_batches(None, 2)),
    "per_step": ("fn must", lambda: mf.per_step(0.1)),
    "lr, a class": ("lr must", lambda: mf.SGD(torch.optim.SGD, 2)),
    "weight_decay": (
        r"weight_decay must .*shape \[2\]",
        lambda: mf.SGD(0.1, 2, 0, False, OUTER["w"]),
    ),
    "strength": (r"strength must .*shape \[2\]", lambda: mf.Penalty(torch.ones(2))),
    "given, a class": ("solution must", lambda: mf.Given(mf.SGD)),
    "given, one argument": ("solution must", lambda: mf.Given(lambda slow: slow)),
    "hypergrad, no argument": ("meta_loss must", lambda: mf.hypergrad(lambda: 0)),
    "over_tasks, no argument": ("meta_loss must", lambda: mf.over_tasks(lambda: 0)),
    "explain": ("meta_loss must", lambda: mf.explain(lambda: 0, OUTER, EPISODE)),
    "path, no argument": (
        "path must",
        lambda: mf.bilevel(PROBLEM, solver=SOLVER, estimator=mf.Unrolled(), path=lambda: [1, 1]),
    ),
    "adapt's path": ("path must", lambda: mf.adapt(PROBLEM, OUTER, None, solver=SOLVER, path=2)),
    "adapt's path, a text": (
        "path must",
        lambda: mf.adapt(PROBLEM, OUTER, torch.zeros(2), solver=SOLVER, path="all"),
    ),
    "episodes, a number": ("episodes must", lambda: mf.stack_episodes(3)),
    "episodes, a tensor": ("episodes must", lambda: mf.stack_episodes(torch.ones(3))),
    "PerStep of a list": ("PerStep holds no tensors", lambda: mf.PerStep([0.0, 1.0]).at(0)),
    "adjoint": (
        "solve must",
        lambda: mf.adjoint(PROBLEM, OUTER, OUTER, torch.zeros(2), OUTER, solve=None),
    ),
    "windows": ("problem must", lambda: mf.algorithms.Windows(loss, SOLVER)),
    "windows' solver": ("solver must", lambda: mf.algorithms.Windows(PROBLEM, None)),
    "pes": ("windows must", lambda: mf.algorithms.PES(PROBLEM, 0.1, 2)),
    "evolution": (
        "meta_loss must",
        lambda: mf.algorithms.Evolution(PROBLEM, 0.1, 2, torch.Generator()),
    ),
    "compare's outer": (
        "outer must",
        lambda: mf.compare(
            PROBLEM, "w", EPISODE, solver=SOLVER, estimators={"a": mf.Unrolled()}, reference="a"
        ),
    ),
    "compare's others": (
        "others must",
        lambda: mf.compare(
            *(PROBLEM, OUTER, EPISODE),
            solver=SOLVER,
            estimators={"a": mf.Unrolled()},
            reference="a",
            others=[META],
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_kind_is_refused_by_name(case):
    message, call = CASES[case]
    # A ProblemError is a ValueError.
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
def test_an_algorithm_wants_a_problem(algorithm):
    with pytest.raises(ProblemError, match=r"problem must be an mf\.Problem"):
        algorithm(loss, 0.1, 0.1)


def test_a_generator_of_episodes_is_stacked():
    stacked = mf.stack_episodes(EPISODE for _ in range(3))
    assert stacked.support.shape == (3, 2)
