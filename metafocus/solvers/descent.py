"""The inner loop: steps of a solver, with or without a graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.autodiff.grad import value_and_grad
from metafocus.checks import scalar
from metafocus.errors import ProblemError
from metafocus.solvers.given import Given
from metafocus.types import InnerLoss, Params, Solution, Solver, State


def descend(
    inner_loss: InnerLoss,
    solver: Solver,
    params: Params,
    state: State,
    outer: Params,
    support: Any,
    steps: Iterable[int],
    *,
    differentiable: bool,
    path: Collection[int] = (),
) -> tuple[Params, State, list[Tensor], list[Params]]:
    """Run inner steps.

    Not `differentiable`: everything given is a constant already.

    Returns:
        Fast weights and solver state after the last step, the loss before each step, and the fast
        weights after those steps whose numbers are in `path`.
    """
    losses, kept = [], []
    own_rule = getattr(solver, "direction", None)
    for step in steps:
        data = streams.at(support, step)
        if own_rule is None:
            # Detach once per step: under vmap every detach is costly.
            value, grads = value_and_grad(
                lambda p, data=data: inner_loss(p, outer, data),
                params,
                differentiable=differentiable,
                cut=False,
            )
        else:
            value, grads = checked(own_rule(inner_loss, params, outer, data), params)
        params, state = solver.update(params, grads, state, step, outer)
        if not differentiable:
            # A learned rate may close over a tensor that requires grad.
            params, state = pt.detach(params), pt.detach(state)
        losses.append(value)
        if step in path:
            kept.append(params)
    return params, state, losses, kept


def checked(result: Any, params: Params) -> tuple[Tensor, Params]:
    """Return what `Solver.direction` returned: a detached loss and one entry for each weight."""
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        raise ProblemError(
            "direction must return (loss, direction) with a dict of one tensor for each fast "
            f"weight, got {type(result).__name__}."
        )
    value, direction = result
    if set(direction) != set(params):
        odd = sorted(set(direction) ^ set(params))
        raise ProblemError(
            f"direction must return one entry for each fast weight; {odd[0]!r} is on one side "
            f"only. Fast weights: {sorted(params)}."
        )
    for k, v in direction.items():
        if not isinstance(v, Tensor) or v.shape != params[k].shape:
            got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ProblemError(
                f"direction must return the shapes of the fast weights: {k!r} has "
                f"{list(params[k].shape)}, its entry {got}."
            )
    return scalar(value, "direction").detach(), direction


def segment(
    inner_loss: InnerLoss, solver: Solver, steps: range, path: Collection[int] = ()
) -> Callable[..., Any]:
    """Return `(params, state, outer, support) -> descend(...)`: steps of explicit tensors."""

    def run(params: Params, state: State, outer: Params, support: Any) -> Any:
        return descend(
            inner_loss, solver, params, state, outer, support, steps, differentiable=True, path=path
        )

    return run


def solve_inner(
    inner_loss: InnerLoss,
    solver: Solver,
    start: Params,
    outer: Params,
    support: Any,
    path: Collection[int] = (),
) -> Solution:
    """Return the inner solution as a constant: by inner steps, or as it is `Given`.

    Args:
        inner_loss: `(fast, slow, data) -> scalar`.
        solver: the inner optimiser.
        start: the fast weights before the first step.
        outer: the slow weights.
        support: what the inner loss sees, or a stream of it.
        path: numbers of the steps, from 0, after which the fast weights are wanted too.
    """
    start, outer, support = pt.detach(start), pt.detach(outer), pt.detach(support)
    if isinstance(solver, Given) and start:
        with torch.enable_grad():
            loss = scalar(inner_loss(start, outer, streams.at(support, 0)), "inner_loss")
        fast = solver.reach(start, outer, support)
        kept = picked([fast] if path else [], path, solver.steps)
        return Solution(fast, pt.detach(loss).reshape(1), kept)
    steps = count(solver, start)
    params, _, losses, kept = descend(
        inner_loss,
        solver,
        start,
        solver.init(start),
        outer,
        support,
        range(steps),
        differentiable=False,
        path=path,
    )
    return Solution(params, stacked(losses, params), picked(kept, path, steps))


def picked(kept: list[Params], path: Collection[int], steps: int) -> tuple[Params, ...]:
    """Return the fast weights that `descend` kept, in the order of `path`.

    Raises:
        ProblemError: if `path` holds a step that the loop does not take.
    """
    odd = [step for step in path if step not in range(steps)]
    if odd:
        raise ProblemError(
            f"path asks for the fast weights after inner step {odd[0]}, and the loop takes {steps} "
            "steps, counted from 0."
        )
    found = dict(zip(sorted(set(path)), kept, strict=True))
    return tuple(found[step] for step in path)


def stacked(losses: list[Tensor], like: Params) -> Tensor:
    """Return the losses as one tensor of shape `[steps]`; `like` gives the device if empty."""
    if losses:
        return torch.stack(losses)
    some = next(iter(like.values()), None)
    return torch.zeros(0) if some is None else some.new_zeros(0)


def count(solver: Solver, params: Params) -> int:
    """Return the number of steps: none where there is nothing to adapt."""
    return solver.steps if params else 0


def refuse_own_rule(who: str, solver: Solver) -> None:
    """Raise if a solver replaces the gradient that an estimator needs."""
    if getattr(solver, "direction", None) is not None:
        raise ProblemError(
            f"{who} needs the gradient of inner_loss, and {type(solver).__name__}.direction "
            "replaces it. Use Unrolled(), Unrolled(recompute=True) or FirstOrder()."
        )
