"""What AmIGO and stocBiO share: some steps on the inner problem, then some on the linear system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from metafocus import params as pt
from metafocus.algorithms.common import (
    StepAux,
    check_stationarity,
    fast_gradient,
    free,
    gradients,
    levels,
    select,
)
from metafocus.algorithms.first_step import SingleLoop
from metafocus.autodiff.hvp import differentiates_twice, hvp_reverse
from metafocus.checks import positive, whole
from metafocus.engine.checked_parts import check_problem
from metafocus.episodes import as_episode
from metafocus.errors import ProblemError
from metafocus.problem import constants
from metafocus.types import HVP, Episode, Params


@dataclass(frozen=True)
class ImplicitSteps(SingleLoop):
    """The settings, and the outer gradient after all steps from a given start."""

    inner_lr: float
    v_lr: float
    inner_steps: int = 10
    v_steps: int = 10
    hvp: HVP = hvp_reverse
    fresh: bool = False

    def __post_init__(self) -> None:
        check_problem(self.problem)
        positive("inner_lr", self.inner_lr)
        positive("v_lr", self.v_lr)
        whole("inner_steps", self.inner_steps, 1)
        whole("v_steps", self.v_steps, 1)

    def solve(
        self, outer: Params, fast: Params, v: Params, episode: Any
    ) -> tuple[Params, Params, Params, StepAux]:
        """Return the outer gradient, `fast`, `v` and aux, all detached."""
        outer, fast, v = constants(outer), pt.detach(fast), pt.detach(v)
        support, query = as_episode(episode)
        inner_steps, v_steps = self.inner_steps, self.v_steps
        self._check_batches(support)

        def batch(i: int) -> Episode:
            return Episode(select(support, i) if self.fresh else support, query)

        self.check(outer, fast, batch(0), twice=differentiates_twice(self.hvp))

        def linearised(i: int) -> tuple[Params, Callable[[Params], tuple[Any, ...]]]:
            return self.hvp(levels(self.problem, batch(i))[0], fast, outer)

        with torch.no_grad():
            for i in range(inner_steps):
                inner, _ = levels(self.problem, batch(i))
                _, slope = fast_gradient(inner, fast, outer)
                fast = pt.add(fast, slope, -self.inner_lr)
            _, upper = levels(self.problem, batch(inner_steps))
            loss, pull, direct = gradients(upper, fast, outer)
            gradient, product = linearised(inner_steps)
            slope = pull
            for i in range(v_steps):
                if self.fresh and i:
                    _, product = linearised(inner_steps + i)
                slope = pt.add(product(v)[0], pull)
                v = pt.add(v, slope, -self.v_lr)
            if self.fresh:
                _, product = linearised(inner_steps + v_steps)
            aux = StepAux(loss, pt.norm(gradient), pt.norm(slope))
            check_stationarity(aux.stationarity)
            return pt.add(direct, free(outer, product(v)[1])), fast, v, aux

    def _check_batches(self, support: Any) -> None:
        batches = self.inner_steps + self.v_steps + 1
        sizes = {x.shape[0] if x.ndim else 0 for x in pt.tensors(support)}
        if self.fresh and sizes != {batches}:
            raise ProblemError(
                f"fresh=True needs inner_steps + v_steps + 1 = {batches} batches stacked on axis 0 "
                f"of every support tensor, got axis-0 sizes {sorted(sizes)}."
            )
