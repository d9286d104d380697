"""Streams in windows and particles, whose steps go on; single-loop algorithms refuse them."""

from __future__ import annotations

import loops
import pytest
import torch
from loops import PROBLEM, STREAMS, hypergradient, slices, start, stream_of, upper
from problems import assert_close

import metafocus as mf

CASE = loops.case()


# --- windows and PES: global steps --------------------------------------------------------------


def windowed(outer, window, batches, query, first):
    """The loss of a window by hand, and its derivative, from where it begins."""

    def loss(slow):
        fast = start(slow, None) if first == 0 else window.fast
        velocity = window.solver_state
        for data in batches[first : first + 2]:
            fast = {
                k: v if v.requires_grad else v.clone().requires_grad_() for k, v in fast.items()
            }
            found = torch.autograd.grad(
                loops.inner(fast, slow, data), list(fast.values()), create_graph=True
            )
            pairs = zip(fast, found, strict=True)
            velocity = {k: loops.MOMENTUM * velocity[k] + g for k, g in pairs}
            fast = {k: v - loops.rate(slow) * velocity[k] for k, v in fast.items()}
        return upper(fast, slow, query[first + 1])

    return hypergradient(outer, loss)


@pytest.mark.parametrize("recompute", [False, True, 2])
@pytest.mark.parametrize("kind", STREAMS)
def test_windows_go_on_in_the_stream(kind, recompute):
    case = loops.case(tasks=1, steps=6)
    whole = case.episode()
    parts = slices(whole.support)
    support = stream_of(kind, whole.support)
    episode = mf.Episode(support, whole.query)
    windows = mf.algorithms.Windows(PROBLEM, solver=loops.solver(2), recompute=recompute)
    window = windows.init(case.outer, support)
    for first in (0, 2, 4):
        leaves = {k: v.clone().requires_grad_() for k, v in case.outer.items()}
        loss, (after, _) = windows.loss(leaves, window, episode)
        got = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        want = windowed(case.outer, window, parts, slices(whole.query), first)
        assert_close(dict(zip(leaves, got, strict=True)), want, 1e-11)
        window = after
    with pytest.raises((mf.errors.ProblemError, IndexError)):
        windows.loss(case.outer, window, episode)


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("algorithm", ["PES", "ESSingle"])
def test_particles_go_on_in_the_stream(algorithm, kind):
    """Every particle's loss is that of the inner loop by hand at its perturbed parameters."""
    case, pairs, sigma = loops.case(tasks=1, steps=6), 2, 0.1
    whole = case.episode()
    parts, queries = slices(whole.support), slices(whole.query)
    support = stream_of(kind, whole.support)
    windows = mf.algorithms.Windows(PROBLEM, solver=loops.solver(2))
    strategy = getattr(mf.algorithms, algorithm)(windows, sigma=sigma, pairs=pairs)
    generator, again = (torch.Generator().manual_seed(3) for _ in range(2))
    state = strategy.init(case.outer, support)
    particles, total, fixed = [None] * 2 * pairs, None, None
    for first in (0, 2, 4):
        episode = mf.Episode(support, whole.query)
        grads, state, aux = strategy.step(case.outer, state, episode, generator=generator)
        noise = {
            k: sigma * torch.randn(pairs, *v.shape, generator=again, dtype=v.dtype)
            for k, v in case.outer.items()
        }
        if algorithm == "ESSingle":
            fixed = noise = fixed or noise
            total = noise
        else:
            total = noise if total is None else {k: total[k] + v for k, v in noise.items()}
        losses = torch.zeros(2, pairs, dtype=torch.float64)
        for sign in (0, 1):
            for i in range(pairs):
                slow = {k: v + (1 - 2 * sign) * noise[k][i] for k, v in case.outer.items()}
                at = particles[sign * pairs + i]
                if at is None:
                    fast = start(slow, None)
                    at = (fast, {k: torch.zeros_like(v) for k, v in fast.items()})
                fast, velocity = at
                for data in parts[first : first + 2]:
                    leaf = {k: v.detach().requires_grad_() for k, v in fast.items()}
                    found = torch.autograd.grad(loops.inner(leaf, slow, data), list(leaf.values()))
                    velocity = {
                        k: loops.MOMENTUM * velocity[k] + g
                        for k, g in zip(leaf, found, strict=True)
                    }
                    fast = {k: v.detach() - loops.rate(slow) * velocity[k] for k, v in leaf.items()}
                particles[sign * pairs + i] = (fast, velocity)
                losses[sign, i] = upper(fast, slow, queries[first + 1])
        assert_close(aux.losses, losses, 1e-12)
        gains = (losses[0] - losses[1]) / (2 * sigma**2 * pairs)
        want = {k: torch.tensordot(gains, v, 1) for k, v in total.items()}
        assert_close(grads, want, 1e-9)  # a difference of losses that agree to two digits


def test_single_loop_algorithms_refuse_a_stream_by_name():
    algorithms = mf.algorithms
    episode = CASE.episode()
    for one in (
        algorithms.SOBA(PROBLEM, inner_lr=0.1, v_lr=0.1),
        algorithms.AmIGO(PROBLEM, inner_lr=0.1, v_lr=0.1),
        algorithms.StocBiO(PROBLEM, inner_lr=0.1, v_lr=0.1),
        algorithms.BOME(PROBLEM, inner_lr=0.1, fast_lr=0.1),
        algorithms.F2SA(PROBLEM, inner_lr=0.1, strength=10.0),
    ):
        state = one.init(CASE.outer, slices(episode.support)[0])
        with pytest.raises(mf.errors.ProblemError, match=r"stream.*one batch"):
            one.step(CASE.outer, state, episode)
