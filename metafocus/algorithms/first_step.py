"""What the first step of a single-loop algorithm checks, as the first call of a meta loss does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from metafocus.preflight import preflight, try_outer_loss
from metafocus.problem import Problem, constants
from metafocus.solvers import SGD
from metafocus.streams import is_stream
from metafocus.types import Params


class Checked:
    """Remembers which problem was checked; a copy with other rates shares it."""

    def __init__(self) -> None:
        self.problem: Problem | None = None


@dataclass(frozen=True)
class SingleLoop:
    """The problem of a single-loop algorithm, and whether it was checked.

    The algorithms differentiate explicit tensors only, and never the second derivative of a
    kernel that has none.
    """

    problem: Problem
    checked: Checked = field(default_factory=Checked, kw_only=True, repr=False, compare=False)

    def check(self, outer: Params, fast: Params, episode: Any, *, twice: bool) -> None:
        """Check the problem at the first step, outside of `torch.compile`.

        Args:
            outer: the outer parameters.
            fast: where the algorithm stands.
            episode: of one batch.
            twice: whether the gradient of the inner loss is differentiated.

        Raises:
            ProblemError: as the first call of a meta loss does.
            ClosureError: if the inner loss closes over a tensor that requires grad.
        """
        if self.checked.problem is self.problem or torch.compiler.is_compiling():
            return
        outer = constants(outer)
        support, query = self.problem.prepared(outer, episode)
        if is_stream(support) or is_stream(query):
            return
        preflight(
            self.problem.inner_loss,
            SGD(1.0, steps=1),
            fast,
            outer,
            support,
            explicit=True,
            redraws=False,
            twice=twice,
        )
        with torch.enable_grad():
            try_outer_loss(lambda *at: self.problem.evaluate(*at)[0], fast, outer, query)
        self.checked.problem = self.problem
