"""One trial of a bilevel problem that finds an ill-posed one before it goes wrong.

`names` asks what the loss reads and closes over, `state` what it changes outside, `kernels` whether
its second derivative exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.autodiff import recompute
from metafocus.autodiff.grad import refuse_inference_mode
from metafocus.autodiff.safe_operators.swapping import Swapped, differentiable_once
from metafocus.autodiff.tape import foreign_nodes
from metafocus.errors import ProblemError
from metafocus.preflight.kernels import refuse_lost_second_derivatives, trust
from metafocus.preflight.names import (
    evaluated,
    new_tensors,
    refuse_closures,
    refuse_hidden,
    refuse_ignored,
)
from metafocus.preflight.state import refused_writes
from metafocus.rng import kept
from metafocus.solvers import Given
from metafocus.solvers.descent import checked
from metafocus.torch_internals import (
    outside_transforms,
    plain,
    transforming,
    unused_by,
)
from metafocus.types import InnerLoss, Params, Solver

__all__ = ["preflight", "refuse_ignored_fast_weights", "trust"]


def preflight(
    inner_loss: InnerLoss,
    solver: Solver,
    start: Params,
    outer: Params,
    support: Any,
    *,
    explicit: bool = False,
    twice: bool = False,
) -> InnerLoss:
    """Try the inner loss, its gradient and one update on constants; return the loss to use.

    Random numbers used by the trial are given back, and so is whatever the trial writes to.

    Args:
        inner_loss: `(fast, slow, data) -> scalar`.
        solver: the inner optimiser.
        start: the fast weights before the first step.
        outer: the slow weights.
        support: what the inner loss sees; of a stream, the data of step 0.
        explicit: whether the estimator differentiates explicit tensors only.
        twice: whether the estimator differentiates the gradient of the inner loss.

    Returns:
        The loss, such that batch norm in training mode leaves its running statistics alone.

    Raises:
        ProblemError: if the loss is not a scalar, asks for a name that it is not given, or does
            not depend on one of the fast weights; if the loss or the solver changes anything in
            place or keeps a state that a forward pass changes; if a second derivative is needed
            and a kernel loses it.
        ClosureError: with `explicit`, if the loss or the solver still needs a derivative although
            all arguments are constants: it closes over a tensor that the estimator cannot see.
    """
    refuse_inference_mode()
    point, slow = pt.detach(start), pt.detach(outer)
    data = streams.at(support, 0)
    if explicit and streams.is_opaque(support):
        refuse_hidden(support, data)
    data = pt.detach(data)
    steps = bool(point) and not isinstance(solver, Given)
    own_rule = getattr(solver, "direction", None)
    given = [(f"the fast weight {k!r}", v) for k, v in point.items()]
    given += [(f"the outer parameter {k!r}", v) for k, v in slow.items()]
    given += [("the support", x) for x in pt.tensors(data)]

    def loss(fast: Params) -> Tensor:
        return evaluated(inner_loss, fast, slow, data)

    swapped, kernels = Swapped(once=True), None
    with kept(pt.tensors((start, outer, data))), torch.enable_grad():
        with refused_writes("inner_loss", given, inner_loss), new_tensors() as made, swapped:
            if transforming():
                unused = unused_by(loss, point)
                results = [loss(point)] if explicit else []
            else:
                unused, value, kernels = _on_tape(loss, point, made)
                results = [value]
            if steps and own_rule is None:
                refuse_ignored(unused, point)
            if explicit:
                refuse_closures("inner_loss", results, made)
        if steps:
            state = solver.init(point)
            moving = given + [("the solver's state", x) for x in pt.tensors(state)]
            with refused_writes("solver.update", moving, solver), new_tensors() as made:
                move = pt.zeros_like(point)
                if own_rule is not None:
                    value, move = checked(own_rule(inner_loss, point, slow, data), point)
                    if explicit:
                        results = [value, *move.values()]
                        refuse_closures("the solver (its direction)", results, made)
                after = solver.update(point, pt.detach(move), state, 0, slow)
                _check_update(after, point)
                if explicit:
                    refuse_closures("the solver (its lr?)", pt.tensors(after), made)
        if twice and (kernels is None or kernels):
            with outside_transforms():
                refuse_lost_second_derivatives(
                    "inner_loss", inner_loss, *_plain((point, slow, data)), kernels
                )
    return differentiable_once(inner_loss) if swapped.statistics else inner_loss


def refuse_ignored_fast_weights(outer_loss: Any, fast: Params) -> None:
    """Raise if an outer loss depends on none of the fast weights.

    Args:
        outer_loss: `fast -> scalar`.
        fast: the adapted fast weights.

    Raises:
        ProblemError: the inner loop would change nothing.
    """
    point = pt.detach(fast)
    if not point or not torch.is_grad_enabled():
        return
    with kept(point.values()), Swapped(once=True):
        unused = unused_by(outer_loss, point)
    if unused == set(point):
        raise ProblemError(
            f"outer_loss depends on none of the fast weights {sorted(point)}: the inner loop would "
            "change nothing. Use fast in it, as in torch.func.functional_call(net, fast, (x,)); "
            "net(x) sees the weights before the adaptation."
        )


def _on_tape(
    loss: Callable[[Params], Tensor], point: Params, made: list[Tensor]
) -> tuple[set[str], Tensor, list[str]]:
    """Return which weights a loss ignores, its value, and the custom kernels in its graph."""
    leaves = {k: v.detach().requires_grad_() for k, v in point.items()}
    made += leaves.values()
    with recompute.searched() as inside:
        value = loss(dict(leaves))
    kernels = sorted({*foreign_nodes([value]), *inside})
    if not value.requires_grad or not leaves:
        return set(point), value, kernels
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {k for k, g in zip(leaves, found, strict=True) if g is None}, value, kernels


def _check_update(after: Any, point: Params) -> None:
    if not isinstance(after, tuple) or len(after) != 2 or not isinstance(after[0], dict):
        raise ProblemError(
            "solver.update must return (fast weights, state), a dict and any pytree, got "
            f"{type(after).__name__}."
        )
    if set(after[0]) != set(point):
        odd = sorted(set(after[0]) ^ set(point))
        raise ProblemError(
            f"solver.update must return every fast weight; {odd[0]!r} is on one side only. Fast "
            f"weights: {sorted(point)}."
        )


def _plain(tree: Any) -> Any:
    inputs, rebuild = pt.partition(tree)
    return rebuild([plain(x).detach() for x in inputs])
