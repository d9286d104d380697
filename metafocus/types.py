"""The nouns of the engine and the protocols that a user's own parts conform to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from metafocus.errors import ProblemError

Params = dict[str, Tensor]
"""Parameters by name; the names are module paths."""

State = Any
"""What an inner solver carries from step to step: any pytree; its tensors can be differentiated."""

InnerLoss = Callable[[Params, Params, Any], Tensor]
"""`(fast, slow, data) -> scalar`."""

OuterLoss = Callable[[Params, Params, Any], Tensor | tuple[Tensor, dict[str, Any]]]
"""`(fast, slow, data) -> scalar`, or `(scalar, metrics)`."""


class Episode(NamedTuple):
    """What one outer step sees: support for the inner loop, query for the outer loss.

    Both are pytrees of tensors, so episodes can be stacked on a new axis 0 and vmapped
    (`mf.stack_episodes`). Either may be a stream, such as `mf.PerStep`.

    Attributes:
        support: what the inner loss is given.
        query: what the outer loss is given.
    """

    support: Any
    query: Any


class Solution(NamedTuple):
    """What an inner loop returns: adapted fast weights and the inner loss before each step.

    Attributes:
        params: the fast weights, which depend on the outer parameters as the estimator decided.
        losses: `[steps]`, detached.
        path: the fast weights after each step that was asked for, in the same order.
    """

    params: Params
    losses: Tensor
    path: tuple[Params, ...] = ()


class Aux(NamedTuple):
    """What `meta_loss` returns beside the loss, detached; over tasks stacked on axis 0.

    Attributes:
        params: the adapted fast weights.
        inner_losses: the inner loss before each step, `[steps]`.
        metrics: what the outer loss returned beside its value.
    """

    params: Params
    inner_losses: Tensor
    metrics: dict[str, Tensor] = {}  # noqa: RUF012 - never written to


class Solver(Protocol):
    """An inner optimiser as a pair of pure functions.

    A solver may also have `direction(inner_loss, params, outer, data) -> (loss, direction)`: a
    rule of its own, such as a closed form or a Hebbian update, that stands in for the gradient.
    `update` is then given the direction. Estimators that need the gradient itself refuse such a
    solver.
    """

    @property
    def steps(self) -> int:
        """How many inner steps to take."""
        ...

    def init(self, params: Params) -> State:
        """Return the state before the first step."""
        ...

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Return the fast weights and the state after step number `step`, counted from 0."""
        ...


class Estimator:
    """Base class of the estimators: how adapted fast weights depend on the outer parameters.

    An estimator is called as `estimator(inner_loss, solver, start, outer, support) -> Solution`.
    It never sees the query. A plain function of these arguments is an estimator too. One that also
    takes the keyword `path`, a tuple of step numbers, returns the fast weights after these steps
    in `Solution.path`; `mf.bilevel` hands `path` over only when it is asked for one.

    Attributes:
        explicit: whether derivatives flow through explicit tensors only, as in a custom Function.
            The engine then refuses losses that close over tensors which would be missed.
        twice: whether the gradient of the inner loss is differentiated. The engine then refuses
            kernels without a second derivative. A function is taken to do so.
    """

    explicit: bool = False
    twice: bool = False

    def __call__(
        self, inner_loss: InnerLoss, solver: Solver, start: Params, outer: Params, support: Any
    ) -> Solution:
        """Solve the inner problem; return fast weights that carry the chosen derivative."""
        raise ProblemError(
            f"{type(self).__name__} must define __call__(self, inner_loss, solver, start, outer, "
            "support) -> mf.Solution."
        )


class HVP(Protocol):
    """A way to multiply with the second derivatives of a scalar loss.

    `hvp(loss, fast, *rest)` returns the gradient by `fast` at this point and a linear `product`
    with `product(direction) == (d/dfast, d/drest...) <grad_fast loss, direction>`: the Hessian
    product and, for each further argument, the mixed product.
    """

    def __call__(
        self, loss: Callable[..., Tensor], fast: Params, *rest: Any
    ) -> tuple[Params, Callable[[Params], tuple[Any, ...]]]:
        """Linearise the gradient of `loss` at `(fast, *rest)`."""
        ...


MatVec = Callable[[Params], Params]
"""A symmetric linear map on fast weights."""

LinearSolver = Callable[[MatVec, Params], Params]
"""`x = solve(matvec, b)` with `matvec(x) == b`, as exactly as the solver promises."""
