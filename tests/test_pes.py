"""PES and ES-Single: against loops over particles exactly, against gradients statistically.

All seeds are fixed; statistical bounds are stated in standard errors of the estimate.
"""

from __future__ import annotations

import io
import math

import problems
import pytest
import torch
from problems import F64, assert_close, flat

import metafocus as mf

NONE = mf.Episode(None, None)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chain(momentum: float = 0.5, steps: int = 2):
    """A nonlinear inner problem with a start that depends on the outer parameters."""

    def inner(fast, slow, x):
        return (torch.tanh(fast["w"] - x) ** 2).sum() + slow["l2"].exp() * (fast["w"] ** 2).sum()

    def upper(fast, slow, y):
        return ((fast["w"] - y) ** 2).sum()

    problem = mf.Problem(inner, upper, init=lambda slow, support: {"w": 2 * slow["start"]})
    unroll = mf.algorithms.Windows(problem, solver=mf.SGD(0.2, steps=steps, momentum=momentum))
    outer = {"l2": torch.tensor(-1.0, dtype=F64), "start": torch.tensor([0.4, -0.2], dtype=F64)}
    g = rng(11)
    episodes = [mf.Episode(*torch.randn(2, 2, generator=g, dtype=F64).unbind()) for _ in range(4)]
    return unroll, outer, episodes


def chain_by_hand(unroll, outer, episodes, sigma, pairs, generator, persistent):
    """Both methods with a Python loop over windows, pairs and signs."""
    windows, summed, fixed, found = {}, None, None, []
    for t, episode in enumerate(episodes):
        noise = fixed
        if persistent or t == 0:
            noise = {
                k: sigma * torch.randn((pairs, *v.shape), generator=generator, dtype=v.dtype)
                for k, v in outer.items()
            }
            fixed = noise
            summed = noise if t == 0 else {k: summed[k] + noise[k] for k in noise}
        total = {k: torch.zeros_like(v) for k, v in outer.items()}
        for i in range(pairs):
            value = {}
            for sign in (1, -1):
                point = {k: v + sign * noise[k][i] for k, v in outer.items()}
                at = unroll.init(point) if t == 0 else windows[i, sign]
                loss, (windows[i, sign], _) = unroll.loss(point, at, episode)
                value[sign] = loss.item()
            gain = (value[1] - value[-1]) / (2 * sigma**2 * pairs)
            total = {k: v + gain * summed[k][i] for k, v in total.items()}
        found.append(total)
    return found


METHODS = [mf.algorithms.PES, mf.algorithms.ESSingle]


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("method", METHODS)
def test_particles_equal_the_loops_by_hand(method, chunk_size):
    unroll, outer, episodes = chain()
    want = chain_by_hand(unroll, outer, episodes, 0.1, 4, rng(9), method is mf.algorithms.PES)
    es = method(unroll, sigma=0.1, pairs=4, chunk_size=chunk_size)
    state, generator = es.init(outer), rng(9)
    for t, episode in enumerate(episodes):
        grads, state, aux = es.step(outer, state, episode, generator=generator)
        # Rounding, amplified by 1 / sigma.
        assert_close(grads, want[t], 1e-10)
        assert aux.losses.shape == (2, 4)
        assert_close(aux.loss, aux.losses.mean(), 1e-15)
        assert state.window.step == 2 * (t + 1)


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_derivative_despite_truncation(method):
    # w_(t+1) = 0.8 w_t from the start a: the loss c w of window t has the derivative c 0.8^t,
    # all of it through the start and the windows before. Truncation alone gives 0.
    def inner(fast, slow, x):
        return 0.5 * (fast["w"] ** 2).sum()

    def upper(fast, slow, c):
        return (c * fast["w"]).sum()

    problem = mf.Problem(inner, upper, init=lambda slow, support: {"w": slow["a"]})
    unroll = mf.algorithms.Windows(problem, solver=mf.SGD(0.2, steps=1))
    pairs, sigma = 4000, 0.5
    es = method(unroll, sigma=sigma, pairs=pairs)
    outer, generator = {"a": torch.ones(1, dtype=F64)}, rng()
    state, window = es.init(outer), unroll.init(outer)
    episode = mf.Episode(None, torch.tensor([3.0], dtype=F64))
    for t in range(1, 5):
        grads, state, aux = es.step(outer, state, episode, generator=generator)
        sums = state.accumulated if method is mf.algorithms.PES else state.noise
        each = (aux.losses[0] - aux.losses[1]) / 2 * sums["a"][:, 0] / sigma**2
        assert_close(grads["a"], each.mean(), 1e-12)
        standard = float(each.std()) / math.sqrt(pairs)
        assert abs(grads["a"].item() - 3 * 0.8**t) < 3 * standard
        assert 3 * standard < 0.5 * 3 * 0.8**t, "enough pairs to tell the truth from 0"
        truncated = torch.func.grad(unroll.loss, has_aux=True)(outer, window, episode)
        window = truncated[1][0]
        if t > 1:
            assert truncated[0]["a"].item() == 0


def test_the_variance_grows_for_pes_and_not_for_es_single():
    # Only the current window counts (fast weights jump to theta): the derivative is 1 in every
    # window, and the noise of PES is all earlier perturbations: variance t + 1 against 2.
    def inner(fast, slow, x):
        return 0.5 * ((fast["w"] - slow["a"]) ** 2).sum()

    def upper(fast, slow, x):
        return fast["w"].sum()

    problem = mf.Problem(inner, upper, init=lambda slow, support: {"w": torch.zeros(1, dtype=F64)})
    unroll = mf.algorithms.Windows(problem, solver=mf.SGD(1.0, steps=1))
    pairs, sigma = 20_000, 0.1
    variance = {}
    for method in METHODS:
        es = method(unroll, sigma=sigma, pairs=pairs)
        outer, generator = {"a": torch.ones(1, dtype=F64)}, rng(4)
        state = es.init(outer)
        for _ in range(16):
            _, state, aux = es.step(outer, state, NONE, generator=generator)
        sums = state.accumulated if method is mf.algorithms.PES else state.noise
        each = (aux.losses[0] - aux.losses[1]) / 2 * sums["a"][:, 0] / sigma**2
        variance[method] = each.var().item()
    # e_16 sum_s e_s has the variance 15 + 2; e^2 has 2. Sample variances of 20 000: 5 %.
    assert variance[mf.algorithms.PES] == pytest.approx(17, rel=0.1)
    assert variance[mf.algorithms.ESSingle] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_pure_and_a_run_resumes(method):
    unroll, outer, episodes = chain()
    es = method(unroll, sigma=0.1, pairs=3)
    generator = rng()
    state = es.init(outer)
    _, state, _ = es.step(outer, state, episodes[0], generator=generator)
    before = flat(state).clone()
    file = io.BytesIO()
    torch.save(
        {
            "window": vars(state.window),
            "sums": state[1],
            "generator": generator.get_state(),
        },
        file,
    )
    want, _, _ = es.step(outer, state, episodes[1], generator=generator)
    assert torch.equal(flat(state), before), "the step changed the state it was given"
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = type(state)(mf.algorithms.Window(**saved["window"]), saved["sums"])
    generator = torch.Generator()
    generator.set_state(saved["generator"])
    got, _, _ = es.step(outer, resumed, episodes[1], generator=generator)
    assert torch.equal(flat(got), flat(want))


@pytest.mark.parametrize("method", METHODS)
def test_the_particles_do_not_alias_the_outer_parameters(method):
    problem = mf.Problem(problems.regression, problems.regression)
    case = problems.maml()
    outer = {k: case.outer[k].clone() for k in problems.FAST}
    es = method(mf.algorithms.Windows(problem, solver=mf.SGD(0.1, steps=1)), sigma=0.1, pairs=2)
    state, generator = es.init(outer), rng()
    _, state, _ = es.step(outer, state, case.episode(), generator=generator)
    before = flat(state).clone()
    for v in outer.values():
        v.add_(1.0)
    assert torch.equal(flat(state), before)


@pytest.mark.parametrize("method", METHODS)
def test_wrong_arguments_of_the_particles(method):
    unroll, outer, episodes = chain()
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        method(unroll, sigma=0.0, pairs=1)
    with pytest.raises(ValueError, match="pairs must be an integer >= 1, got 0"):
        method(unroll, sigma=0.1, pairs=0)
    es = method(unroll, sigma=0.1, pairs=1)
    with pytest.raises(ValueError, match=r"generator must be a torch\.Generator"):
        es.step(outer, es.init(outer), episodes[0], generator=None)
    with pytest.raises(TypeError, match="generator"):
        es.step(outer, es.init(outer), episodes[0])
    broken = mf.Episode(episodes[0].support, episodes[0].query * math.nan)
    with pytest.raises(mf.errors.NonFiniteError, match="2 of 2 perturbed"):
        es.step(outer, es.init(outer), broken, generator=rng())
