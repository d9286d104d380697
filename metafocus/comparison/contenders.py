"""What is compared: estimators, meta losses, compiled forms and single-loop algorithms."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from metafocus.checks import takes
from metafocus.engine import bilevel, hypergrad
from metafocus.errors import ProblemError
from metafocus.factories import Made
from metafocus.graph import compiled
from metafocus.problem import Problem
from metafocus.tasks import over_tasks
from metafocus.types import Params, Solver

Gradient = Callable[[Params, Any], Params]
"""`(outer, episode) -> hypergradient`."""


def of_estimator(problem: Problem, solver: Solver, estimator: Any, tasks: bool) -> Gradient:
    """Return the hypergradient of an estimator, over tasks their mean."""
    meta = bilevel(problem, solver=solver, estimator=estimator)
    return _First(hypergrad(over_tasks(meta, aux="losses") if tasks else meta))


def follows_solver(other: Any) -> bool:
    """Return whether a contender is a function of the solver, which returns the contender."""
    if not callable(other) or _is_algorithm(other) or isinstance(other, Made):
        return False
    return not takes(other, 2)


def of_other(name: str, other: Any, solver: Solver, tasks: bool, seed: int) -> Gradient:
    """Return the hypergradient of a contender that is not an estimator.

    Args:
        name: for messages.
        other: the contender, or a function of the solver that returns it.
        solver: the inner optimiser.
        tasks: whether the episode holds several.
        seed: for the generators of the contender.

    Raises:
        ProblemError: if it is nothing of the kind, or no mean over tasks can be made of it.
    """
    if follows_solver(other):
        other = other(solver)
    other = seeded_again(other, seed)
    if isinstance(other, Made) and other.make in (hypergrad, compiled):
        each = _of_mean(name, other) if tasks else other
        return _First(each, watched=other.make is not compiled)
    if _is_algorithm(other) and not callable(other):
        return _of_algorithm(other, max(solver.steps, 1), tasks)
    if not callable(other):
        raise ProblemError(
            f"others: {name!r} must be a meta loss, a hypergradient of mf.hypergrad or "
            f"mf.compiled, an algorithm with init and step, or a function of the solver that "
            f"returns one, got {type(other).__name__}."
        )
    meta: Any = other
    return _First(hypergrad(over_tasks(meta, aux="losses") if tasks else meta))


def seeded_again(part: Any, seed: int) -> Any:
    """Return the part with generators of its own, whose draws follow from theirs and the seed.

    So the draws of a seed are the same whatever ran before, in whatever process.
    """
    if isinstance(part, torch.Generator):
        return torch.Generator(part.device).manual_seed(part.initial_seed() + seed)
    if isinstance(part, Made):
        args = tuple(seeded_again(x, seed) for x in part.args)
        return part.make(*args, **{k: seeded_again(x, seed) for k, x in part.kwargs.items()})
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return part
    fields = [f.name for f in dataclasses.fields(part) if f.init]
    new = {name: seeded_again(getattr(part, name), seed) for name in fields}
    changed = {k: v for k, v in new.items() if v is not getattr(part, k)}
    return dataclasses.replace(part, **changed) if changed else part


@dataclass(frozen=True)
class _First:
    """A hypergradient without its auxiliary output.

    Attributes:
        function: returns both.
        watched: whether its tensors can be counted: not those of compiled code.
    """

    function: Callable[..., Any]
    watched: bool = True

    def __call__(self, outer: Params, episode: Any) -> Params:
        return self.function(outer, episode)[0]


def _is_algorithm(other: Any) -> bool:
    return hasattr(other, "init") and hasattr(other, "step")


def _of_mean(name: str, gradient: Any) -> Any:
    """Return the hypergradient of a meta loss as that of its mean over tasks, compiled if it was.

    Raises:
        ProblemError: if it was made of anything else: its meta loss is then unknown.
    """
    if not isinstance(gradient, Made) or gradient.make not in (hypergrad, compiled):
        raise ProblemError(
            f"others: {name!r} compiles a function of its own, of which no mean over tasks can be "
            "made: compile mf.hypergrad(meta_loss), or leave tasks out of over."
        )
    given = inspect.signature(gradient.make).bind(*gradient.args, **gradient.kwargs).arguments
    inner = given.pop(next(iter(given)))
    if gradient.make is compiled:
        return compiled(_of_mean(name, inner), **given)
    return hypergrad(over_tasks(inner, aux="losses"))


def _of_algorithm(algorithm: Any, steps: int, tasks: bool) -> Gradient:
    """Return what an algorithm says after some of its steps, while the outer parameters rest.

    Over tasks: the mean of what it says of each, with a state of its own.
    """

    def run(outer: Params, episode: Any) -> Params:
        state, grads = algorithm.init(outer, episode[0]), {}
        for _ in range(steps):
            grads, state, _ = algorithm.step(outer, state, episode)
        return grads

    def mean(outer: Params, episodes: Any) -> Params:
        each = torch.func.vmap(run, in_dims=(None, 0), randomness="different")(outer, episodes)
        return {k: v.mean(0) for k, v in each.items()}

    return mean if tasks else run
