"""Hypergradients from perturbed copies of the fast weights instead of second derivatives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from metafocus import tree
from metafocus.autodiff.composites import Swapped
from metafocus.problem import Problem
from metafocus.solvers.descent import solve_inner
from metafocus.types import Params, Solution, Solver


@dataclass(frozen=True)
class EvoGrad:
    """One evolutionary step after the inner loop, through which the hypergradient flows.

    `fast_k = fast + sigma eps_k` for `copies` normal draws `eps_k`, and
    `fast* = sum_k softmax(-inner_loss(fast_k, slow) / temperature)_k fast_k`: copies with a
    smaller loss weigh more, and the losses depend on the slow weights. Only first derivatives of
    the inner loss are needed. `fast` is the constant that the solver reaches, tied
    straight-through to `init(outer)` as in `Unrolled(last=0)`; `steps=0` perturbs the start, as
    the paper does.

    The step is small (`|fast* - fast|` is of the order of `sigma`) and lies in the span of the
    draws, so the estimate is noisy and its size depends on `sigma^2 / temperature`, the step
    size of the implied gradient descent: choose them by the outer learning rate.

    Args:
        sigma: length of the perturbation of each entry.
        copies: how many; at least 2. The paper takes 2.
        temperature: of the softmax.
        generator: where the draws come from; None: torch's own. Under `vmap` say
            `over_tasks(..., randomness="different")`.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> import metafocus as mf
        >>> def inner(fast, slow, x):
        ...     return ((fast["w"] - slow["c"]) ** 2).sum()
        >>> def outer_loss(fast, slow, x):
        ...     return fast["w"].sum()
        >>> problem = mf.Problem(inner, outer_loss, init=lambda slow: {"w": torch.zeros(2)})
        >>> estimator = mf.EvoGrad(0.1, copies=64, temperature=1.0)
        >>> meta = mf.bilevel(problem, solver=mf.SGD(0.1, steps=0), estimator=estimator)
        >>> grads, _ = mf.hypergrad(meta)({"c": torch.ones(2)}, mf.Episode(None, None))
        >>> bool((grads["c"] > 0).all())
        True

    References:
        Bohdal, Yang and Hospedales, arXiv 2106.10575.
    """

    sigma: float
    copies: int = 2
    temperature: float = 1.0
    generator: torch.Generator | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("sigma", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if isinstance(self.copies, bool) or not isinstance(self.copies, int) or self.copies < 2:
            raise ValueError(f"copies must be an integer >= 2, got {self.copies!r}.")

    def __call__(self, problem: Problem, solver: Solver, outer: Params, support: Any) -> Solution:
        """Run the inner loop, perturb, weigh."""
        start = problem.start(outer)
        reached, losses = solve_inner(problem.inner_loss, solver, start, outer, support)
        centre = {k: x + (start[k] - start[k].detach()) for k, x in reached.items()}
        if not centre:
            return Solution(centre, losses)
        fits, candidates = [], []
        for _ in range(self.copies):
            copy = {k: x + self.sigma * self._noise(x) for k, x in centre.items()}
            # First derivatives: only what would be silently wrong is swapped.
            with Swapped(once=True):
                fits.append(problem.inner_loss(copy, outer, support))
            candidates.append(copy)
        weights = torch.softmax(-torch.stack(fits) / self.temperature, 0)
        fast = tree.zeros_like(centre)
        for weight, copy in zip(weights.unbind(), candidates, strict=True):
            fast = tree.add(fast, copy, weight)
        return Solution(fast, losses)

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(
            like.shape, generator=self.generator, dtype=like.dtype, device=like.device
        )
