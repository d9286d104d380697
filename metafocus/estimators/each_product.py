"""The implicit derivative with new data of a stream for each product (stocBiO)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.hvp import evaluated_for
from metafocus.estimators.attached import Inner, Point, System, first_only, once
from metafocus.estimators.watched import HESSIAN, Watched
from metafocus.solvers.descent import count
from metafocus.types import HVP, LinearSolver, Params


class EachProduct(System):
    """The condition that the inner gradient vanishes, with new data for each product.

    The data are those of the steps after the inner ones; the last are for the mixed product.
    """

    def __init__(self, inner: Inner, name: str, solve: LinearSolver, hvp: HVP):
        super().__init__(inner)
        self.name = name
        self.solve = solve
        self.hvp = hvp
        self.first: int = count(inner.solver, inner.start)

    def pull(self, point: Point, right: Params, wanted: Sequence[bool]) -> list[Tensor]:
        """Return `-M' H^-1 v`, each product on the data of its own step."""
        reasons = [*pt.tensors(tuple(point)), *right.values()]
        fixed, right = Point(*pt.detach(tuple(point))), pt.detach(right)
        at, together = fixed.floats(wanted)
        steps = itertools.count(self.first)

        def linearised() -> Callable[[Params], tuple[Any, ...]]:
            step = next(steps)

            def loss(fast: Params, xs: list[Tensor]) -> Tensor:
                outer, stream = together(xs)
                return self.inner_loss(fast, outer, stream.at(step))

            return self.hvp(evaluated_for(self.hvp, loss), fixed.fast, at)[1]

        solve = Watched(self.solve)
        with torch.no_grad():
            solved = solve(lambda d: linearised()(d)[0], right)
            solve.warn("Implicit", "the Hessian", solved, 1.0, HESSIAN)
            grads = [-g for g in linearised()(solved)[1]]
        return once(self.name, grads, reasons)

    def push(self, point: Point, along: list[Tensor]) -> Params:
        """Refuse."""
        raise first_only(self.name)
