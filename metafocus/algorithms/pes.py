"""Persistent evolution strategies: unbiased hypergradients from truncated windows, by values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.algorithms.evolution import (
    check,
    check_losses,
    contract,
    normal,
    spread,
)
from metafocus.algorithms.windows import Window, Windows
from metafocus.calls import attempted
from metafocus.checks import seeded
from metafocus.episodes import as_episode
from metafocus.errors import ProblemError
from metafocus.problem import check_params, constants, moving
from metafocus.types import Params


class ParticleAux(NamedTuple):
    """What a step returns beside the gradient: the mean loss, and those of all particles.

    `losses` has the shape `[2, pairs]`, positive perturbations first.
    """

    loss: Tensor
    losses: Tensor


class PESState(NamedTuple):
    """The particles of `PES` between two windows.

    Attributes:
        window: the inner loops of `2 * pairs` particles, stacked on axis 0.
        accumulated: the sum of each pair's perturbations so far, `[pairs, ...]`.
    """

    window: Window
    accumulated: Params


class ESSingleState(NamedTuple):
    """The particles of `ESSingle` between two windows.

    Attributes:
        window: the inner loops of `2 * pairs` particles, stacked on axis 0.
        noise: each pair's one perturbation, `[pairs, ...]`; zeros before the first window.
    """

    window: Window
    noise: Params


@dataclass(frozen=True)
class Particles:
    """What both strategies are made of: antithetic pairs of inner loops, window by window."""

    windows: Windows
    sigma: float
    pairs: int
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.windows, Windows):
            raise ProblemError(
                "windows must be mf.algorithms.Windows(problem, solver), got "
                f"{type(self.windows).__name__}."
            )
        check(self.sigma, self.pairs, self.chunk_size)

    def begin(self, outer: Params, support: Any) -> tuple[Window, Params]:
        """Return unperturbed particles, which the first window replaces, and zero perturbations."""
        inputs, rebuild = pt.partition(self.windows.init(outer, support))
        stack = rebuild([x.expand(2 * self.pairs, *x.shape).clone() for x in inputs])
        zeros = {k: v.new_zeros((self.pairs, *v.shape)) for k, v in moving(outer).items()}
        return stack, zeros

    def drawn(self, outer: Params, generator: torch.Generator) -> Params:
        """Return a perturbation for each pair, `[pairs, ...]`."""
        return pt.scale(normal(moving(outer), self.pairs, generator), self.sigma)

    def advance(
        self, outer: Params, noise: Params, window: Window, episode: Any
    ) -> tuple[Tensor, Window]:
        """Return the losses `[2, pairs]` of one window and where the particles stand after it."""
        check_params(outer, "outer", "outer parameters")
        outer = constants(outer)
        points = spread(moving(outer), noise, 1.0)
        support = as_episode(episode).support

        def one(point: Params, at: Window) -> tuple[Tensor, Window]:
            point = {k: point.get(k, v) for k, v in outer.items()}
            # The start depends on the outer parameters too: the first perturbation moves it.
            at = self.windows.init(point, support) if at.step == 0 else at
            loss, (after, _) = self.windows.loss(point, at, episode)
            return loss.detach(), after

        with torch.no_grad():
            losses, after = torch.func.vmap(one, chunk_size=self.chunk_size, randomness="same")(
                points, window
            )
        losses = losses.reshape(2, -1)
        check_losses(losses)
        return losses, after

    def gradient(self, outer: Params, losses: Tensor, noise: Params) -> Params:
        """Return `1 / (2 sigma^2 pairs) sum_i (L_i+ - L_i-) noise_i`; zeros for what is frozen."""
        return pt.zeros_like(outer) | contract(losses, noise, self.sigma**2 * self.pairs)


@dataclass(frozen=True)
class PES(Particles):
    """Persistent evolution strategies: each window's loss against all perturbations so far.

    In window `t` pair `i` runs its two inner loops on with `outer +- sigma e_it`; then
    `g_t = 1 / (2 sigma^2 pairs) sum_i (L_it+ - L_it-) sum_(s<=t) sigma e_is`. The expectation of
    `g_t` is the whole derivative of the (smoothed) loss of window `t`, through all earlier
    windows as well: unbiased under truncation where `Windows` alone is not. The variance grows
    with the number of windows; `ESSingle` avoids that.

    Start over with `init` at the end of an inner problem. The state holds no random numbers
    to come, and a resumed run equals an uninterrupted one if the generator's state is saved too.

    Args:
        windows: the inner loop, cut into `Windows`.
        sigma: standard deviation of a perturbation.
        pairs: number of antithetic pairs.
        chunk_size: how many of the `2 * pairs` particles `vmap` runs at once; None: all.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> import metafocus as mf
        >>> def inner(fast, slow, x):
        ...     return ((fast["w"] - slow["a"]) ** 2).sum()
        >>> def upper(fast, slow, x):
        ...     return fast["w"].sum()
        >>> problem = mf.Problem(inner, upper, init=lambda slow, _: {"w": torch.zeros(1)})
        >>> windows = mf.algorithms.Windows(problem, solver=mf.SGD(0.1, steps=2))
        >>> pes = mf.algorithms.PES(windows, sigma=0.1, pairs=500)
        >>> outer, generator = {"a": torch.ones(1)}, torch.Generator().manual_seed(0)
        >>> state = pes.init(outer)
        >>> for _ in range(3):
        ...     grads, state, aux = pes.step(
        ...         outer, state, mf.Episode(None, None), generator=generator
        ...     )
        >>> state.window.step, grads["a"].shape
        (6, torch.Size([1]))

    References:
        Vicol, Metz and Sohl-Dickstein, arXiv 2112.13835.
    """

    @attempted
    def init(self, outer: Params, support: Any = None) -> PESState:
        """Return the particles before the first window."""
        return PESState(*self.begin(outer, support))

    @attempted
    def step(
        self, outer: Params, state: PESState, episode: Any, *, generator: torch.Generator
    ) -> tuple[Params, PESState, ParticleAux]:
        """Run every particle through one window with a new perturbation.

        Args:
            outer: the outer parameters now; they may have moved since the last window.
            state: the particles.
            episode: support and query of this window, the same for all particles.
            generator: where the perturbations come from; advanced.

        Returns:
            `(gradient, next state, aux)`, all detached.

        Raises:
            ValueError: without a generator.
            NonFiniteError: outside transforms, if a particle's loss is NaN or infinite.
        """
        seeded(generator)
        noise = self.drawn(outer, generator)
        losses, window = self.advance(outer, noise, state.window, episode)
        accumulated = pt.add(state.accumulated, noise)
        grads = self.gradient(outer, losses, accumulated)
        return grads, PESState(window, accumulated), ParticleAux(losses.mean(), losses)


@dataclass(frozen=True)
class ESSingle(Particles):
    """ES-Single: one perturbation per pair of particles for the whole inner problem.

    `g_t = 1 / (2 sigma pairs) sum_i (L_it+ - L_it-) e_i` with the same `e_i` in every window `t`:
    unbiased under truncation like `PES`, and the variance does not grow with the number of
    windows. It estimates the derivative of the loss smoothed along constant perturbations.

    Start over with `init` at the end of an inner problem; that draws new perturbations.

    Args:
        windows: the inner loop, cut into `Windows`.
        sigma: standard deviation of a perturbation.
        pairs: number of antithetic pairs.
        chunk_size: how many of the `2 * pairs` particles `vmap` runs at once; None: all.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - slow["a"]) ** 2).sum()
        >>> problem = mf.Problem(loss, loss, init=lambda slow, _: {"w": torch.zeros(1)})
        >>> unroll = mf.algorithms.Windows(problem, solver=mf.SGD(0.1, steps=2))
        >>> single = mf.algorithms.ESSingle(unroll, sigma=0.1, pairs=50)
        >>> outer, generator = {"a": torch.ones(1)}, torch.Generator().manual_seed(0)
        >>> grads, state, aux = single.step(
        ...     outer, single.init(outer), mf.Episode(None, None), generator=generator
        ... )
        >>> aux.losses.shape
        torch.Size([2, 50])

    References:
        Vicol, arXiv 2304.11153.
    """

    @attempted
    def init(self, outer: Params, support: Any = None) -> ESSingleState:
        """Return the particles before the first window."""
        return ESSingleState(*self.begin(outer, support))

    @attempted
    def step(
        self, outer: Params, state: ESSingleState, episode: Any, *, generator: torch.Generator
    ) -> tuple[Params, ESSingleState, ParticleAux]:
        """Run every particle through one window; arguments and errors as for `PES.step`.

        The generator is used in the first window only.
        """
        seeded(generator)
        noise = state.noise
        if state.window.step == 0:
            noise = self.drawn(outer, generator)
        losses, window = self.advance(outer, noise, state.window, episode)
        grads = self.gradient(outer, losses, noise)
        return grads, ESSingleState(window, noise), ParticleAux(losses.mean(), losses)
