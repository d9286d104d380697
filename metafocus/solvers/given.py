"""Inner solutions that the user brings: a closed form, L-BFGS, scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.checks import function
from metafocus.errors import NonFiniteError, ProblemError, TransformError
from metafocus.problem import check_params
from metafocus.torch_internals import transforming
from metafocus.types import Params, State


@dataclass(frozen=True)
class Given:
    """An inner solver that is the user's own function from slow weights to the solution.

    `fast = solution(slow, support)`. It takes the place of `SGD` in `bilevel` and `adapt`, with
    the estimators that use the solution only: `Implicit`, `FixedPoint`, `Penalty` (with a solver
    of its own), `EvoGrad`. The function sees detached tensors with grad mode on, so it may build
    leaves and call `.backward()`, or leave torch through numpy; its result is a constant, moved
    to the dtype and the device of what `problem.init` returns. `problem.init` gives names and
    shapes.

    Under `vmap` the function sees batched tensors: torch operations work, `.numpy()`, `.item()`,
    `.backward()` and `torch.optim` do not; use `over_tasks(..., how="loop")` for those.

    Args:
        solution: `(slow, support) -> fast`.

    Raises:
        ProblemError: if the names or shapes differ from those of `problem.init`, for tensors
            that are not floating-point, and in estimators that differentiate steps.
        NonFiniteError: outside transforms, if the solution is NaN or infinite.
        TransformError: under `vmap`, if the function fails there.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum() + slow["l2"] * (fast["w"] ** 2).sum()
        >>> ridge = mf.Problem(loss, loss, init=lambda slow, support: {"w": torch.ones(1)})
        >>> solver = mf.Given(lambda slow, x: {"w": x / (1 + slow["l2"])})
        >>> mf.adapt(ridge, {"l2": torch.tensor(1.0)}, torch.tensor([4.0]), solver=solver).params
        {'w': tensor([2.])}
    """

    solution: Callable[[Params, Any], Params]

    def __post_init__(self) -> None:
        form = "(slow, support) -> fast: write mf.Given(lambda slow, support: fast)"
        function("solution", self.solution, form, 2)

    @property
    def steps(self) -> int:
        """One: from the start to the solution."""
        return 1

    def init(self, params: Params) -> State:
        """Return nothing: there is no state."""
        return {}

    def update(
        self, params: Params, grads: Params, state: State, step: int, outer: Params
    ) -> tuple[Params, State]:
        """Refuse: there are no steps."""
        raise self.without_steps()

    def without_steps(self) -> ProblemError:
        """Return the error of an estimator or a method that needs inner steps."""
        return ProblemError(
            f"{self} has no inner steps to differentiate or to run one by one. Use Implicit, "
            "FixedPoint or Penalty, or a solver such as SGD."
        )

    def reach(self, start: Params, outer: Params, support: Any) -> Params:
        """Return the solution, checked and detached."""
        try:
            with torch.enable_grad():
                found = self.solution(pt.detach(outer), pt.detach(support))
        except RuntimeError as error:
            if not transforming():
                raise
            raise TransformError(
                f"Given: the solution function failed under vmap or torch.compile: {error} It "
                "sees batched tensors there, without numpy, .item(), .backward() and "
                'torch.optim. Use over_tasks(..., how="loop").'
            ) from error
        return _checked(found, start)


def _checked(found: Any, start: Params) -> Params:
    check_params(found, "Given: the solution", "fast weights")
    if set(found) != set(start):
        odd = sorted(set(found) ^ set(start))
        raise ProblemError(
            f"Given: solution and init must return the same names; {odd[0]!r} is on one side "
            f"only. init: {sorted(start)}, solution: {sorted(found)}."
        )
    result: dict[str, Tensor] = {}
    for k, v in start.items():
        if found[k].shape != v.shape:
            raise ProblemError(
                f"Given: the solution's {k!r} has shape {list(found[k].shape)}, init's has "
                f"{list(v.shape)}."
            )
        # A copy: the function may return its input, or memory that numpy will write to again.
        result[k] = found[k].detach().to(v, copy=True)
        if not transforming() and not result[k].isfinite().all():
            raise NonFiniteError(
                f"Given: the solution's {k!r} is NaN or infinite. Look at the solver behind it, "
                "or make the inner problem strictly convex (add a regulariser)."
            )
    return result
