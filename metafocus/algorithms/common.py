"""What the single-loop algorithms share: both levels as functions, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.grad import value_and_grad
from metafocus.autodiff.safe_operators.swapping import Swapped, differentiable_twice
from metafocus.checks import scalar
from metafocus.errors import NonFiniteError, ProblemError
from metafocus.problem import Problem, check_params, is_frozen, refuse_empty
from metafocus.streams import is_stream
from metafocus.torch_internals import transforming
from metafocus.types import Params

Level = Callable[[Params, Params], Tensor]
"""`(fast, outer) -> scalar`."""


class StepAux(NamedTuple):
    """What a step returns beside the gradient, detached and as it was before the step's updates.

    Attributes:
        loss: the outer loss.
        stationarity: norm of the inner gradient at `state.fast`.
        residual: how far the algorithm's second unknown is from solved; each class says of what.
    """

    loss: Tensor
    stationarity: Tensor
    residual: Tensor


def levels(problem: Problem, episode: Any) -> tuple[Level, Level]:
    """Return the inner and the outer loss of an episode as functions of `(fast, outer)`.

    An algorithm of your own begins with them, as those of `mf.algorithms` do. `prepare` is part of
    both, and the inner one can be differentiated twice.

    Raises:
        ProblemError: when they are called, if support or query is a stream.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> data = mf.Episode(torch.zeros(1), torch.ones(1))
        >>> inner, upper = mf.algorithms.levels(mf.Problem(loss, loss), data)
        >>> inner({"w": torch.tensor([3.0])}, {}), upper({"w": torch.tensor([3.0])}, {})
        (tensor(9.), tensor(4.))
    """
    inner_loss = differentiable_twice(problem.inner_loss)

    def inner(fast: Params, outer: Params) -> Tensor:
        support = _batch(problem.prepared(outer, episode).support, "support")
        return scalar(inner_loss(fast, outer, support), "inner_loss")

    def upper(fast: Params, outer: Params) -> Tensor:
        query = _batch(problem.prepared(outer, episode).query, "query")
        with Swapped(once=True):
            return problem.evaluate(fast, outer, query)[0]

    return inner, upper


def _batch(data: Any, name: str) -> Any:
    if is_stream(data):
        raise ProblemError(
            f"the {name} is a stream ({type(data).__name__}), and a single-loop algorithm takes "
            "one batch at each call of step: pass the data of one step, stream.at(i)."
        )
    return data


def gradients(level: Level, fast: Params, outer: Params) -> tuple[Tensor, Params, Params]:
    """Return value, gradient by `fast` and gradient by `outer`, all constants."""

    def joined(both: Params) -> Tensor:
        return level({k: both["fast " + k] for k in fast}, {k: both["outer " + k] for k in outer})

    at = {"fast " + k: v for k, v in fast.items()} | {"outer " + k: v for k, v in outer.items()}
    value, grads = value_and_grad(joined, at, differentiable=False)
    by_outer = {k: grads["outer " + k] for k in outer}
    return value, {k: grads["fast " + k] for k in fast}, free(outer, by_outer)


def free(outer: Params, grads: Params) -> Params:
    """Return the gradient by the outer parameters, with zeros for what is frozen."""
    return {k: torch.zeros_like(g) if is_frozen(outer[k]) else g for k, g in grads.items()}


def fast_gradient(level: Level, fast: Params, outer: Params) -> tuple[Tensor, Params]:
    """Return value and gradient by `fast`, both constants."""
    return value_and_grad(lambda f: level(f, outer), fast, differentiable=False)


def start(problem: Problem, outer: Params, support: Any) -> Params:
    """Return the first fast weights, as a copy of their own.

    An identity `init` would alias the outer parameters, which optimisers change in place.
    """
    check_params(outer, "outer", "outer parameters")
    refuse_empty(outer, "a single-loop algorithm")
    return {k: v.clone() for k, v in problem.first(outer, support).items()}


def select(data: Any, index: int | Tensor) -> Any:
    """Return entry `index` of every tensor of a stacked pytree."""
    inputs, rebuild = pt.partition(data)
    return rebuild([x[index] for x in inputs])


def check_stationarity(stationarity: Tensor) -> None:
    """Raise outside transforms if the inner gradient is not finite; one host synchronisation."""
    if not transforming() and not torch.isfinite(stationarity):
        raise NonFiniteError(
            f"The inner gradient is {stationarity.item()} at state.fast. Lower inner_lr, or look "
            "at the support data."
        )
