"""Hypergradients from perturbed copies of the fast weights instead of second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.autodiff.safe_operators.swapping import Swapped
from metafocus.autodiff.tied import tied_to
from metafocus.calls import draws_from
from metafocus.checks import positive, whole
from metafocus.solvers.descent import count, solve_inner
from metafocus.types import Estimator, InnerLoss, Params, Solution, Solver


@dataclass(frozen=True)
class EvoGrad(Estimator):
    """One evolutionary step after the inner loop, through which the hypergradient flows.

    `fast_k = fast + sigma eps_k` for `copies` normal draws `eps_k`, and
    `fast* = sum_k softmax(-inner_loss(fast_k, slow) / temperature)_k fast_k`: copies with a
    smaller loss weigh more, and the losses depend on the slow weights. Only first derivatives of
    the inner loss are needed. `fast` is the constant that the solver reaches, tied
    straight-through to `init(outer)` as in `Unrolled(last=0)`; `steps=0` perturbs the start, as
    the paper does. With a stream, the copies are judged on the data of the last step.

    The step is small (`|fast* - fast|` is of the order of `sigma`) and lies in the span of the
    draws, so the estimate is noisy and its size depends on `sigma^2 / temperature`, the step
    size of the implied gradient descent: choose them by the outer learning rate.

    Losses of perturbed copies see through `detach()`: where the inner loss detaches something that
    depends on the fast weights (Meta-Weight-Net), the result is another one than on the tape.

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
        >>> problem = mf.Problem(inner, outer_loss, init=lambda slow, _: {"w": torch.zeros(2)})
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
        positive("sigma", self.sigma)
        positive("temperature", self.temperature)
        whole("copies", self.copies, 2)

    def __call__(
        self,
        inner_loss: InnerLoss,
        solver: Solver,
        start: Params,
        outer: Params,
        support: Any,
        *,
        path: tuple[int, ...] = (),
    ) -> Solution:
        """Run the inner loop, perturb, weigh."""
        found = solve_inner(inner_loss, solver, start, outer, support, path)
        if not start:
            return found

        def evolved(fast: Params, step: int) -> Params:
            data = streams.at(support, step)
            return self._evolved(lambda p: inner_loss(p, outer, data), tied_to(start, fast))

        last = max(count(solver, start) - 1, 0)
        kept = {t: evolved(fast, t) for t, fast in zip(path, found.path, strict=True)}
        # One set of draws for each step: the end of the path is the solution.
        params = kept[last] if last in kept else evolved(found.params, last)
        return Solution(params, found.losses, tuple(kept[t] for t in path))

    def _evolved(self, loss: Callable[[Params], Tensor], centre: Params) -> Params:
        """Return the mean of perturbed copies, each weighed by its loss."""
        if self.generator is not None:
            draws_from(self.generator)
        fits, candidates = [], []
        for _ in range(self.copies):
            copy = {k: x + self.sigma * self._noise(x) for k, x in centre.items()}
            # First derivatives: only what would be silently wrong is swapped.
            with Swapped(once=True):
                fits.append(loss(copy))
            candidates.append(copy)
        weights = torch.softmax(-torch.stack(fits) / self.temperature, 0)
        fast = pt.zeros_like(centre)
        for weight, copy in zip(weights.unbind(), candidates, strict=True):
            fast = pt.add(fast, copy, weight)
        return fast

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(
            like.shape, generator=self.generator, dtype=like.dtype, device=like.device
        )
