"""F2SA: the value-function penalty, both inner problems warm-started; no second derivative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.algorithms.common import (
    StepAux,
    check_stationarity,
    fast_gradient,
    gradients,
    levels,
    start,
)
from metafocus.algorithms.first_step import SingleLoop
from metafocus.calls import attempted
from metafocus.checks import positive, whole
from metafocus.engine.checked_parts import check_problem
from metafocus.problem import constants
from metafocus.types import Params


class F2SAState(NamedTuple):
    """Two solutions of the inner problem and the multiplier between the levels.

    Attributes:
        fast: tends to the minimum of the inner loss.
        nudged: tends to the minimum of `inner_loss + outer_loss / strength`.
        strength: the multiplier of the next step, a scalar.
    """

    fast: Params
    nudged: Params
    strength: Tensor


@dataclass(frozen=True)
class F2SA(SingleLoop):
    """F2SA: fully first-order, by the penalty `F + strength (G - min G)` in place of `F`.

    `inner_steps` times `fast -= inner_lr grad_fast G(fast)` and
    `nudged -= inner_lr (grad_fast G + grad_fast F / strength)(nudged)`; then
    `g = grad_outer F(nudged) + strength (grad_outer G(nudged) - grad_outer G(fast))`;
    then `strength += growth`. No second derivative anywhere. With exact solves the bias of `g` is
    `O(1 / strength)`; a growing strength removes it, and amplifies what the solves leave open.

    Args:
        problem: the bilevel problem; `init` gives the start of both solutions.
        inner_lr: rate of both inner problems; that of the paper for `nudged` is
            `inner_lr / strength`, so that it stays stable as the strength grows.
        strength: the multiplier at the first step (lambda in the paper).
        growth: what each step adds to it; 0 keeps it.
        inner_steps: steps on both inner problems; 1 is the single loop.

    The `stationarity` of `StepAux` and its `residual`, the norm of
    `grad_fast G + grad_fast F / strength` at `nudged`, are taken before the last inner step.

    Raises:
        ValueError: for a negative growth, and for a rate, a strength or a number of steps that
            is not positive.

    Example:
        >>> import metafocus as mf
        >>> def inner(fast, slow, x):
        ...     return ((fast["w"] - slow["a"]) ** 2).sum()
        >>> def upper(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> problem = mf.Problem(inner, upper, init=lambda slow, _: {"w": torch.zeros(1)})
        >>> f2sa = mf.algorithms.F2SA(problem, inner_lr=0.25, strength=100.0, inner_steps=30)
        >>> outer, episode = {"a": torch.zeros(1)}, mf.Episode(None, torch.ones(1))
        >>> grads, state, aux = f2sa.step(outer, f2sa.init(outer), episode)
        >>> grads["a"]  # -2 up to 1 / strength
        tensor([-1.9802])

    References:
        Kwon, Kwon, Wright and Nowak, arXiv 2301.10945.
    """

    inner_lr: float
    strength: float
    growth: float = 0.0
    inner_steps: int = 1

    def __post_init__(self) -> None:
        check_problem(self.problem)
        positive("inner_lr", self.inner_lr)
        positive("strength", self.strength)
        whole("inner_steps", self.inner_steps, 1)
        if not self.growth >= 0:
            raise ValueError(f"growth must be >= 0, got {self.growth}.")

    @attempted
    def init(self, outer: Params, support: Any = None) -> F2SAState:
        """Return the state before the first step, both solutions at `problem.init(outer)`."""
        fast = start(self.problem, outer, support)
        like = next(iter(fast.values()))
        strength = torch.tensor(self.strength, dtype=like.dtype, device=like.device)
        return F2SAState(fast, dict(fast), strength)

    @attempted
    def step(
        self, outer: Params, state: F2SAState, episode: Any
    ) -> tuple[Params, F2SAState, StepAux]:
        """Return the outer gradient, the next state and aux, all detached.

        Raises:
            NonFiniteError: outside transforms, if the inner gradient is NaN or infinite.
        """
        outer, (fast, nudged, strength) = constants(outer), pt.detach(state)
        self.check(outer, fast, episode, twice=False)
        inner, upper = levels(self.problem, episode)
        slope = pull = pt.zeros_like(fast)
        with torch.no_grad():
            for _ in range(self.inner_steps):
                _, slope = fast_gradient(inner, fast, outer)
                _, pull = fast_gradient(
                    lambda f, o: inner(f, o) + upper(f, o) / strength, nudged, outer
                )
                fast = pt.add(fast, slope, -self.inner_lr)
                nudged = pt.add(nudged, pull, -self.inner_lr)
            loss, _, direct = gradients(upper, nudged, outer)
            _, _, here = gradients(inner, nudged, outer)
            _, _, there = gradients(inner, fast, outer)
            grads = pt.add(direct, pt.sub(here, there), strength)
            aux = StepAux(loss, pt.norm(slope), pt.norm(pull))
            check_stationarity(aux.stationarity)
            return grads, F2SAState(fast, nudged, strength + self.growth), aux
