"""Truncated windows of a very long inner loop: outer updates while the inner loop goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metafocus import tree
from metafocus.autodiff.backends import scalar
from metafocus.autodiff.composites import differentiable_twice
from metafocus.autodiff.recompute import recompute
from metafocus.errors import ProblemError
from metafocus.levels import transforming
from metafocus.probe import probe
from metafocus.problem import Problem, check_finite, check_params
from metafocus.solvers.descent import segment, stacked
from metafocus.types import Aux, Params, Solver, State


@dataclass(frozen=True)
class Window:
    """Where a long inner loop stands: all that is needed to go on, detached.

    A pytree whose leaves are the tensors; `step` is its static part, so windows at the same step
    can be stacked and vmapped. To checkpoint, save `vars(window)` and restore `Window(**saved)`.

    Attributes:
        fast: the fast weights.
        solver_state: velocities, moments, whatever the solver carries.
        step: how many inner steps have been taken.
    """

    fast: Params
    solver_state: State
    step: int


def _flatten(window: Window) -> tuple[list[Any], int]:
    return [window.fast, window.solver_state], window.step


def _unflatten(children: Iterable[Any], step: Any) -> Window:
    fast, solver_state = children
    return Window(fast, solver_state, step)


# The step is static: a plain leaf would be refused by vmap and by the aux output of
# torch.func.grad, and a tensor would break solvers that look their schedule up by step.
pytree.register_pytree_node(Window, _flatten, _unflatten, serialized_type_name="metafocus.Window")


@dataclass(frozen=True)
class Windows:
    """What `windows` returns; see there.

    Attributes:
        problem: the bilevel problem.
        solver: the inner optimiser; its `steps` are the length of a window.
        recompute: as for `Unrolled`.
    """

    problem: Problem
    solver: Solver
    recompute: bool | int = False

    def __post_init__(self) -> None:
        if self.solver.steps < 1:
            raise ValueError(
                f"solver.steps must be >= 1: it is the length of a window, got {self.solver.steps}."
            )
        if not isinstance(self.recompute, int) or self.recompute < 0:
            raise ValueError(f"recompute must be an integer >= 0, got {self.recompute!r}.")

    def init(self, outer: Params) -> Window:
        """Return the window before the first step, at `problem.init(outer)`."""
        check_params(outer, "outer", "outer parameters")
        fast = _copied(self.problem.start(tree.detach(outer)))
        return Window(fast, _copied(self.solver.init(fast)), 0)

    def loss(
        self, outer: Params, window: Window, episode: Any
    ) -> tuple[Tensor, tuple[Window, Aux]]:
        """Take `solver.steps` inner steps and return the outer loss after them.

        Args:
            outer: the outer parameters; the loss is differentiable by them.
            window: where the inner loop stands; a constant.
            episode: support for these steps, query for the outer loss after them.

        Returns:
            `(loss, (next window, Aux))`; both detached but the loss.

        Raises:
            ProblemError: if `window` is not a `Window` of this problem.
            ClosureError: at step 0, if `recompute` would miss a closed-over tensor.
            NonFiniteError: outside transforms, if an inner loss is NaN or infinite.
        """
        check_params(outer, "outer", "outer parameters")
        if not isinstance(window, Window):
            raise ProblemError(
                f"window must be a Window, got {type(window).__name__}. Start with "
                "windows.init(outer) and go on with the window that loss returns."
            )
        support, query = self.problem.prepared(outer, episode)
        problem, fast, state = self.problem, tree.detach(window.fast), window.solver_state
        state = tree.detach(state)
        if window.step == 0:
            if not torch.compiler.is_compiling():
                explicit = bool(self.recompute)
                problem = probe(problem, self.solver, outer, support, explicit=explicit)
            # The start moves with the outer parameters in the first window, and only there.
            start = problem.start(outer)
            fast, state = _tied(fast, start), _tied(state, self.solver.init(start))
        fast, state, losses = self._steps(fast, state, outer, support, window.step)
        inner_losses = stacked(losses, fast).detach()
        if not transforming():
            check_finite(inner_losses)
        loss = scalar(problem.outer_loss(fast, outer, query), "outer_loss")
        fast, state = tree.detach(fast), tree.detach(state)
        return loss, (Window(fast, state, window.step + self.solver.steps), Aux(fast, inner_losses))

    def _steps(
        self, fast: Params, state: State, outer: Params, support: Any, first: int
    ) -> tuple[Params, State, list[Tensor]]:
        loss = differentiable_twice(self.problem.inner_loss)
        last = first + self.solver.steps
        size = int(self.recompute) or self.solver.steps
        losses: list[Tensor] = []
        for begin in range(first, last, size):
            run = segment(loss, self.solver, range(begin, min(begin + size, last)))
            args = (fast, state, outer, support)
            fast, state, more = recompute(run, *args) if self.recompute else run(*args)
            losses += more
        return fast, state, losses


def windows(problem: Problem, *, solver: Solver, recompute: bool | int = False) -> Windows:
    """Cut a very long inner loop into windows of `solver.steps` steps, one outer step each.

    Truncated back-propagation through time with warm starts: window `j` starts from the fast
    weights and the solver state that window `j - 1` ended with, held constant, and its loss is
    differentiated through its own steps only. What the outer parameters did in earlier windows
    has no share in the derivative: cheap, and biased (`mf.PES` is not). In the first window the
    derivative also flows through `problem.init`, so one window over all steps is `mf.Unrolled()`.

    Args:
        problem: the bilevel problem.
        solver: the inner optimiser; its `steps` are the length of a window.
        recompute: as for `mf.Unrolled`.

    Returns:
        An object with `init(outer) -> Window` and
        `loss(outer, window, episode) -> (loss, (Window, Aux))`. Both are pure: the state is the
        `Window`, and the loss works under `backward`, `torch.func.grad` and `vmap`.

    Raises:
        ValueError: if a window has no steps, or for a negative `recompute`.

    Example:
        >>> import metafocus as mf
        >>> def inner(fast, slow, x):
        ...     return slow["scale"] * ((fast["w"] - x) ** 2).sum()
        >>> def upper(fast, slow, x):
        ...     return (fast["w"] ** 2).sum()
        >>> problem = mf.Problem(inner, upper, init=lambda slow: {"w": torch.ones(1)})
        >>> unroll = mf.windows(problem, solver=mf.SGD(0.1, steps=5))
        >>> outer = {"scale": torch.tensor(1.0, requires_grad=True)}
        >>> window = unroll.init(outer)
        >>> for _ in range(3):
        ...     episode = mf.Episode(torch.zeros(1), torch.zeros(1))
        ...     loss, (window, aux) = unroll.loss(outer, window, episode)
        ...     loss.backward()
        >>> window.step
        15

    References:
        Williams and Peng, Neural Computation 1990; Wu et al., arXiv 1803.02021 (its bias).
    """
    return Windows(problem, solver, recompute)


def _copied(values: Any) -> Any:
    """Return a detached copy: an identity `init` would alias what the outer optimiser writes to."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, values)


def _tied(values: Any, source: Any) -> Any:
    """Return `values` with the derivative of `source`, straight-through."""

    def tie(value: Any, like: Any) -> Any:
        smooth = isinstance(like, Tensor) and like.is_floating_point()
        return value + (like - like.detach()) if smooth else value

    return pytree.tree_map(tie, values, source)
