"""A bilevel problem at the top of a module, so that processes can compare on it."""

from __future__ import annotations

import torch

import metafocus as mf

STEPS = [1, 2, 4]
RATE = 0.1


def inner_loss(fast, slow, data):
    return 0.5 * (data * (fast["w"] - slow["w"]) ** 2).sum() + 0.05 * (fast["w"] ** 4).sum()


def outer_loss(fast, slow, data):
    return 0.5 * ((fast["w"] - data) ** 2).sum() + 0.1 * (slow["w"] ** 2).sum()


def zeros(slow, support):
    return {"w": torch.zeros_like(slow["w"])}


PROBLEM = mf.Problem(inner_loss, outer_loss, zeros)


def outer(seed: int = 0) -> mf.Params:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(4, generator=generator, dtype=torch.float64)}


def episode(seed: int = 0) -> mf.Episode:
    generator = torch.Generator().manual_seed(100 + seed)
    draw = torch.rand(2, 4, generator=generator, dtype=torch.float64) + 0.5
    return mf.Episode(draw[0], draw[1])


def tasks(seed: int = 0) -> mf.Episode:
    return mf.stack_episodes([episode(10 * seed + i) for i in range(5)])


def soba(solver: mf.SGD) -> mf.algorithms.SOBA:
    return mf.algorithms.SOBA(PROBLEM, inner_lr=RATE, v_lr=RATE)


def evolution(solver: mf.SGD) -> mf.algorithms.Evolution:
    value = mf.bilevel(PROBLEM, solver=solver, estimator=mf.FirstOrder())
    generator = torch.Generator().manual_seed(0)
    return mf.algorithms.Evolution(value, sigma=1e-3, pairs=4, generator=generator)


def exact(outer: mf.Params, episode: mf.Episode, solver: mf.SGD) -> mf.Params:
    meta = mf.bilevel(PROBLEM, solver=solver, estimator=mf.Unrolled())
    return mf.hypergrad(meta)(outer, episode)[0]
