"""Several steps of every algorithm that carries a state, and what is left after them."""

from __future__ import annotations

from typing import Any

import torch
from outputs.hypergradients import hypergrad
from outputs.networks import episodes, first, loss, penalties, plain, weights
from outputs.versions import algorithms, problem
from torch import Tensor

import metafocus as mf


def hyper(dtype) -> tuple[mf.Problem, dict[str, Tensor]]:
    """Weights started as a constant, whose penalty is learned."""
    start = weights(dtype)
    return mf.recipes.hpo.log_l2(plain, lambda: start), penalties(dtype)


def leaves_of(state: Any) -> dict[str, Tensor]:
    """The tensors of a state by number, in the order of its pytree."""
    return {f"{i:03}": x for i, x in enumerate(torch.utils._pytree.tree_leaves(state))}


def descend(run, outer, state, episode_at, **settings):
    """Four outer steps; what the last ones return, and the outer parameters after them."""
    told = []
    for i in range(4):
        grads, state, aux = run.step(outer, state, episode_at(i), **settings)
        outer = {k: v - 0.1 * grads[k] for k, v in outer.items()}
        told.append(aux)
    return {"grads": grads, "state": leaves_of(state), "aux": told, "outer": outer}


def single_loop(make):
    def run(dtype):
        posed, outer = hyper(dtype)
        algorithm, many = make(posed), episodes(dtype)
        one = first(many)
        return descend(algorithm, outer, algorithm.init(outer), lambda i: one)

    return run


def saba(dtype):
    posed, outer = hyper(dtype)
    algorithm, many = algorithms.SABA(posed, inner_lr=0.1, v_lr=0.1), episodes(dtype)
    generator = torch.Generator().manual_seed(1)
    state = algorithm.init(outer, many)
    return descend(algorithm, outer, state, lambda _: algorithms.draw(many, generator=generator))


def fresh(dtype):
    """stocBiO with a batch of its own for every step."""
    posed, outer = hyper(dtype)
    algorithm = algorithms.StocBiO(posed, 0.1, 0.1, inner_steps=2, v_steps=2, fresh=True)
    many = episodes(dtype)
    episode = mf.Episode(many.support, first(many).query)
    return descend(algorithm, outer, algorithm.init(outer), lambda i: episode)


def windows(**settings):
    """Three windows of a long loop, started at the outer parameters."""

    def run(dtype):
        posed = problem(mf.proximal(loss, 0.3), loss)
        unroll = algorithms.Windows(posed, solver=mf.Adam(0.05, steps=3), **settings)
        outer, many, told = weights(dtype), episodes(dtype), []
        window = unroll.init(outer)
        for i in range(3):
            episode = torch.utils._pytree.tree_map(lambda x, i=i: x[i], many)
            leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
            value, (window, _) = unroll.loss(leaves, window, episode)
            value.backward()
            grads = {k: v.grad for k, v in leaves.items()}
            outer = {k: v - 0.1 * grads[k] for k, v in outer.items()}
            told.append({"loss": value, "grads": grads})
        return {"told": told, "state": leaves_of(window), "step": window.step}

    return run


def particles(make):
    def run(dtype):
        posed = problem(mf.proximal(loss, 0.3), loss)
        unroll = algorithms.Windows(posed, solver=mf.SGD(0.05, steps=2, momentum=0.5))
        algorithm, outer = make(unroll, sigma=0.05, pairs=3), weights(dtype)
        one, generator = first(episodes(dtype)), torch.Generator().manual_seed(2)
        state = algorithm.init(outer)
        return descend(algorithm, outer, state, lambda i: one, generator=generator)

    return run


def evolution(**settings):
    def run(dtype):
        meta = mf.bilevel(
            problem(loss, loss), solver=mf.SGD(0.1, steps=2), estimator=mf.FirstOrder()
        )
        generator = torch.Generator().manual_seed(4)
        smoothed = algorithms.Evolution(meta, sigma=0.1, pairs=6, generator=generator, **settings)
        return [hypergrad(smoothed, weights(dtype), episodes(dtype)) for _ in range(2)]

    return run


OUTPUTS = {
    "SOBA": single_loop(lambda p: algorithms.SOBA(p, inner_lr=0.1, v_lr=0.1)),
    "SABA": saba,
    "AmIGO": single_loop(lambda p: algorithms.AmIGO(p, 0.1, 0.1, inner_steps=3, v_steps=3)),
    "StocBiO": single_loop(lambda p: algorithms.StocBiO(p, 0.1, 0.1, inner_steps=3, v_steps=3)),
    "StocBiO, fresh batches": fresh,
    "BOME": single_loop(lambda p: algorithms.BOME(p, inner_lr=0.1, fast_lr=0.05, inner_steps=3)),
    "F2SA": single_loop(
        lambda p: algorithms.F2SA(p, inner_lr=0.1, strength=5.0, growth=0.5, inner_steps=3)
    ),
    "windows": windows(),
    "windows, recompute": windows(recompute=2),
    "PES": particles(lambda *a, **k: algorithms.PES(*a, **k)),
    "ESSingle": particles(lambda *a, **k: algorithms.ESSingle(*a, **k)),
    "evolution": evolution(),
    "evolution, chunks": evolution(chunk_size=4),
}
