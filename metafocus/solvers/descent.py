"""The inner loop: steps of a solver, with or without a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from metafocus import tree
from metafocus.autodiff.backends import scalar, value_and_grad
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
) -> tuple[Params, State, list[Tensor]]:
    """Run inner steps; return fast weights, solver state and the loss before each step.

    Not `differentiable`: everything given is a constant already.
    """
    losses = []
    for step in steps:
        # Constants are cut off once in a step: under vmap each cut is a noticeable cost.
        value, grads = value_and_grad(
            lambda p: inner_loss(p, outer, support),
            params,
            differentiable=differentiable,
            cut=False,
        )
        params, state = solver.update(params, grads, state, step, outer)
        if not differentiable:
            # A learned rate may close over a tensor that requires grad.
            params, state = tree.detach(params), tree.detach(state)
        losses.append(value)
    return params, state, losses


def segment(inner_loss: InnerLoss, solver: Solver, steps: range) -> Callable[..., Any]:
    """Return `(params, state, outer, support) -> descend(...)`: steps of explicit tensors."""

    def run(params: Params, state: State, outer: Params, support: Any) -> Any:
        return descend(
            inner_loss, solver, params, state, outer, support, steps, differentiable=True
        )

    return run


def solve_inner(
    inner_loss: InnerLoss, solver: Solver, start: Params, outer: Params, support: Any
) -> Solution:
    """Return the inner solution as a constant: by inner steps, or as it is `Given`."""
    start, outer, support = tree.detach(start), tree.detach(outer), tree.detach(support)
    if isinstance(solver, Given) and start:
        with torch.enable_grad():
            loss = scalar(inner_loss(start, outer, support), "inner_loss")
        return Solution(solver.reach(start, outer, support), tree.detach(loss).reshape(1))
    params, _, losses = descend(
        inner_loss,
        solver,
        start,
        solver.init(start),
        outer,
        support,
        range(count(solver, start)),
        differentiable=False,
    )
    return Solution(params, stacked(losses, params))


def stacked(losses: list[Tensor], like: Params) -> Tensor:
    """Return the losses as one tensor of shape `[steps]`; `like` gives the device if empty."""
    if losses:
        return torch.stack(losses)
    some = next(iter(like.values()), None)
    return torch.zeros(0) if some is None else some.new_zeros(0)


def count(solver: Solver, params: Params) -> int:
    """Return the number of steps: none where there is nothing to adapt."""
    return solver.steps if params else 0
