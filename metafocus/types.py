"""The nouns of the engine and the protocols that a user's own parts conform to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Params = dict[str, Tensor]
"""Parameters by name; the names are module paths."""

State = Any
"""What an inner solver carries from step to step: a pytree of tensors."""

InnerLoss = Callable[[Params, Params, Any], Tensor]
"""`(fast, slow, data) -> scalar`."""


class Episode(NamedTuple):
    """What one outer step sees: support for the inner loop, query for the outer loss.

    Both are pytrees of tensors, so episodes can be stacked on a new axis 0 and vmapped.

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
    """

    params: Params
    losses: Tensor


class Aux(NamedTuple):
    """What `meta_loss` returns beside the loss, detached; over tasks stacked on axis 0.

    Attributes:
        params: the adapted fast weights.
        inner_losses: the inner loss before each step, `[steps]`.
    """

    params: Params
    inner_losses: Tensor


class Solver(Protocol):
    """An inner optimiser as a pair of pure functions."""

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
