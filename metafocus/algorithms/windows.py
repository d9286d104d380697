"""Truncated windows of a very long inner loop: outer updates while the inner loop goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.autodiff.purity import watched
from metafocus.autodiff.recompute import recompute
from metafocus.autodiff.safe_operators.swapping import Swapped, differentiable_twice
from metafocus.calls import attempted
from metafocus.checks import check_finite, whole
from metafocus.engine.checked_parts import check_problem, check_solver
from metafocus.errors import ProblemError
from metafocus.path import Path, path_weights, weighted
from metafocus.preflight import preflight, try_outer_loss
from metafocus.problem import Problem, check_params
from metafocus.solvers.descent import segment, stacked
from metafocus.torch_internals import pytree, transforming
from metafocus.types import Aux, Params, Solver, State


@dataclass(frozen=True)
class Window:
    """The state of a long inner loop between two windows: all that is needed to continue, detached.

    A pytree whose leaves are the tensors; `step` is its static part, so windows at the same step
    can be stacked and vmapped. To checkpoint, save `vars(window)` and restore `Window(**saved)`.

    Attributes:
        fast: the fast weights.
        solver_state: velocities, moments, and so on; a part that is not a tensor is held
            in a `Static`.
        step: how many inner steps have been taken.
    """

    fast: Params
    solver_state: State
    step: int


@dataclass(frozen=True)
class Static:
    """A part of a solver's state that is not a tensor, such as None: a pytree without leaves."""

    value: Any


pytree.register_pytree_node(
    Static,
    lambda static: ([], static.value),
    lambda _, value: Static(value),
    serialized_type_name="metafocus.Static",
)


def _held(state: State) -> State:
    """Return the state with every part that is not a tensor in a `Static`."""
    return pytree.tree_map(lambda x: x if isinstance(x, Tensor) else Static(x), state)


def _released(state: State) -> State:
    """Return the state as the solver knows it."""

    def release(x: Any) -> Any:
        return x.value if isinstance(x, Static) else x

    return pytree.tree_map(release, state, is_leaf=lambda x: isinstance(x, Static))


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
    """A very long inner loop cut into windows of `solver.steps` steps, one outer step each.

    Truncated back-propagation through time with warm starts: window `j` starts from the fast
    weights and the solver state that window `j - 1` ended with, held constant, and its loss is
    differentiated through its own steps only. What the outer parameters did in earlier windows
    has no share in the derivative: cheap, and biased (`PES` is not). In the first window the
    derivative also flows through `problem.init`, so one window over all steps is `mf.Unrolled()`.

    Both methods are pure: the state is the `Window`, and the loss works under `backward`,
    `torch.func.grad` and `vmap`. Streams are asked for global steps, which go on from window to
    window.

    Args:
        problem: the bilevel problem.
        solver: the inner optimiser; its `steps` are the length of a window.
        recompute: as for `mf.Unrolled`.
        path: as for `mf.bilevel`: weights of the outer loss after each step of a window.

    Raises:
        ValueError: if a window has no steps, or for a negative `recompute`.

    Example:
        >>> import metafocus as mf
        >>> def inner(fast, slow, x):
        ...     return slow["scale"] * ((fast["w"] - x) ** 2).sum()
        >>> def upper(fast, slow, x):
        ...     return (fast["w"] ** 2).sum()
        >>> problem = mf.Problem(inner, upper, init=lambda slow, support: {"w": torch.ones(1)})
        >>> windows = mf.algorithms.Windows(problem, solver=mf.SGD(0.1, steps=5))
        >>> outer = {"scale": torch.tensor(1.0, requires_grad=True)}
        >>> episode = mf.Episode(torch.zeros(1), torch.zeros(1))
        >>> window = windows.init(outer, episode.support)
        >>> for _ in range(3):
        ...     loss, (window, aux) = windows.loss(outer, window, episode)
        ...     loss.backward()
        >>> window.step
        15

    References:
        Williams and Peng, Neural Computation 1990; Wu et al., arXiv 1803.02021 (its bias).
    """

    problem: Problem
    solver: Solver
    recompute: bool | int = False
    path: Path | None = None

    def __post_init__(self) -> None:
        check_problem(self.problem)
        check_solver(self.solver)
        whole("solver.steps", self.solver.steps, 1, note=" (the length of a window)")
        if not isinstance(self.recompute, bool):
            whole("recompute", self.recompute)

    @attempted
    def init(self, outer: Params, support: Any = None) -> Window:
        """Return the window before the first step, at `problem.init(outer, support)`.

        The support is prepared here if the problem has a `prepare`.
        """
        check_params(outer, "outer", "outer parameters")
        fast = _copied(self.problem.first(outer, support))
        return Window(fast, _held(_copied(self.solver.init(fast))), 0)

    @attempted
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
            ProblemError: if `window` is not a `Window` of this problem, and at step 0 for what
                the first call of a meta loss refuses.
            ClosureError: at step 0, if `recompute` would miss a closed-over tensor.
            NonFiniteError: outside transforms, if an inner loss is NaN or infinite.
        """
        check_params(outer, "outer", "outer parameters")
        if not isinstance(window, Window):
            raise ProblemError(
                f"window must be a Window, got {type(window).__name__}. Start with "
                "windows.init(outer, support) and go on with the window that loss returns."
            )
        support, query = self.problem.prepared(outer, episode)
        fast, state = pt.detach(window.fast), _released(pt.detach(window.solver_state))
        if window.step == 0:
            start = self.problem.start(outer, support)
            if not torch.compiler.is_compiling():
                preflight(
                    self.problem.inner_loss,
                    self.solver,
                    start,
                    outer,
                    support,
                    explicit=bool(self.recompute),
                    twice=torch.is_grad_enabled(),
                )
            # The start moves with the outer parameters in the first window, and only there.
            fast, state = _tied(fast, start), _tied(state, self.solver.init(start))
        steps = range(window.step, window.step + self.solver.steps)
        fast, state, losses, kept = self._steps(fast, state, outer, support, steps)
        inner_losses = stacked(losses, fast).detach()
        if not transforming():
            check_finite(inner_losses)
        if self.path is None:
            ends = [(None, fast, streams.at(query, steps[-1]))]
        else:
            weights = path_weights(self.path, outer, len(steps))
            data = [streams.at(query, t) for t in steps]
            ends = list(zip(weights, kept, data, strict=True))
        if window.step == 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            try_outer_loss(lambda *at: self.problem.evaluate(*at)[0], fast, outer, ends[-1][-1])
        with Swapped(once=True):
            loss, metrics = weighted(self.problem, ends, outer)
        fast, state = pt.detach(fast), _held(pt.detach(state))
        return loss, (Window(fast, state, steps.stop), Aux(fast, inner_losses, metrics))

    def _steps(
        self, fast: Params, state: State, outer: Params, support: Any, steps: range
    ) -> tuple[Params, State, list[Tensor], list[Params]]:
        loss = differentiable_twice(self.problem.inner_loss)
        wanted = () if self.path is None else steps
        if not self.recompute:
            return segment(loss, self.solver, steps, wanted)(fast, state, outer, support)
        size, losses, kept = int(self.recompute), [], []
        support = watched(support)
        for first in range(steps.start, steps.stop, size):
            part = range(first, min(first + size, steps.stop))
            # The fast weights after the last step are the result already.
            run = segment(loss, self.solver, part, [t for t in part[:-1] if t in wanted])
            args = (fast, state, outer, streams.part(support, part))
            fast, state, more, inside = recompute(run, *args)
            losses += more
            kept += [*inside, fast]
        return fast, state, losses, kept


def _copied(values: Any) -> Any:
    """Return a detached copy: an identity `init` would alias what the outer optimiser writes to."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, values)


def _tied(values: Any, source: Any) -> Any:
    """Return `values` with the derivative of `source`, straight-through."""

    def tie(value: Any, like: Any) -> Any:
        moves = isinstance(like, Tensor) and pt.is_differentiable(like)
        return value + (like - like.detach()) if moves else value

    return pytree.tree_map(tie, values, source)
