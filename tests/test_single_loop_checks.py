"""Single-loop algorithms check the problem at their first step, as a meta loss does."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import metafocus as mf
from metafocus.errors import ProblemError

F64 = torch.float64
NAMES = ("SOBA", "SABA", "StocBiO", "AmIGO", "BOME", "F2SA")
HIDDEN = torch.tensor(0.3, requires_grad=True)


class RawSine(torch.autograd.Function):
    """A kernel whose backward pass returns numbers without a graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, g):
        return (g * torch.cos(ctx.saved_tensors[0])).detach()


def raw_kernel(fast, slow, x):
    return (slow["a"] * RawSine.apply(fast["w"] - x)).sum() + (fast["w"] ** 2).sum()


def squares(fast, slow, x):
    return ((fast["w"] - slow["a"] - x) ** 2).sum()


def in_place(fast, slow, x):
    return ((fast["w"] - slow["a"] - x.add_(1.0)) ** 2).sum()


def only_slow(fast, slow, x):
    return (slow["a"] - x).sum()


MISTAKES = {
    "kernel": (raw_kernel, squares, ("SOBA", "SABA", "StocBiO", "AmIGO"), "second derivative"),
    "closure": (lambda f, s, x: HIDDEN * squares(f, s, x), squares, None, "closes over a tensor"),
    "in place": (in_place, squares, None, "changes the support in place"),
    "outer loss without fast": (squares, only_slow, None, "depends on none of the fast weights"),
    "inner loss without fast": (only_slow, squares, None, "does not depend on the fast weight"),
}


def small(name, problem):
    rates = {"inner_lr": 0.1, "fast_lr" if name == "BOME" else "v_lr": 0.1}
    if name == "F2SA":
        rates = {"inner_lr": 0.1, "strength": 10.0}
    return getattr(mf.algorithms, name)(problem, **rates)


def begun(name, algorithm, outer):
    """The state and the episode of a first step."""
    halves = torch.tensor([0.5, 0.7], dtype=F64), torch.tensor([0.1, 0.2], dtype=F64)
    if name == "SABA":
        data = mf.Episode(*(x[:, None] for x in halves))
        return algorithm.init(outer, data), mf.algorithms.draw(
            data, generator=torch.Generator().manual_seed(0)
        )
    return algorithm.init(outer), mf.Episode(*halves)


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k, row in MISTAKES.items() for n in row[2] or NAMES]
)
def test_the_first_step_refuses_what_would_be_silently_wrong(kind, name):
    inner, upper, _, words = MISTAKES[kind]
    problem = mf.Problem(inner, upper, init=lambda slow, _: {"w": torch.ones(1, dtype=F64)})
    algorithm, outer = small(name, problem), {"a": torch.tensor(0.4, dtype=F64)}
    with pytest.raises(ProblemError, match=words):
        state, episode = begun(name, algorithm, outer)
        algorithm.step(outer, state, episode)


@pytest.mark.parametrize("name", ["BOME", "F2SA"])
def test_first_derivatives_of_a_kernel_are_enough_for_penalties(name):
    problem = mf.Problem(raw_kernel, squares, init=lambda slow, _: {"w": torch.ones(1, dtype=F64)})
    algorithm, outer = small(name, problem), {"a": torch.tensor(0.4, dtype=F64)}
    assert algorithm.step(outer, *begun(name, algorithm, outer))[0]["a"].isfinite()


def test_the_problem_is_checked_once_also_where_rates_change():
    calls = []

    def counted(fast, slow, x):
        calls.append(None)
        return squares(fast, slow, x)

    problem = mf.Problem(counted, squares, init=lambda slow, _: {"w": torch.ones(1, dtype=F64)})
    soba, outer = small("SOBA", problem), {"a": torch.tensor(0.4, dtype=F64)}
    state, episode = begun("SOBA", soba, outer)
    numbers = []
    for _ in range(3):
        calls.clear()
        _, state, _ = soba.step(outer, state, episode)
        numbers.append(len(calls))
        soba = dataclasses.replace(soba, inner_lr=soba.inner_lr / 2)
    assert numbers[0] > numbers[1] == numbers[2] == 1


def test_a_loss_may_draw_from_its_own_generator_where_nothing_is_run_again():
    generator = torch.Generator()

    def noisy(fast, slow, x):
        return squares(fast, slow, x + torch.randn(x.shape, generator=generator, dtype=F64))

    problem = mf.Problem(noisy, squares, init=lambda slow, _: {"w": torch.ones(1, dtype=F64)})
    soba, outer = small("SOBA", problem), {"a": torch.tensor(0.4, dtype=F64)}
    assert soba.step(outer, *begun("SOBA", soba, outer))[0]["a"].isfinite()


def test_windows_refuse_an_outer_loss_that_ignores_the_fast_weights():
    problem = mf.Problem(squares, only_slow, init=lambda slow, _: {"w": torch.ones(1, dtype=F64)})
    windows = mf.algorithms.Windows(problem, solver=mf.SGD(0.1, steps=2))
    outer, x = {"a": torch.tensor(0.4, dtype=F64, requires_grad=True)}, torch.ones(1, dtype=F64)
    with pytest.raises(ProblemError, match="depends on none of the fast weights"):
        windows.loss(outer, windows.init(outer, x), mf.Episode(x, x))
