"""Learning rates: a number, a function of the outer parameters, or one for each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus.checks import function, not_negative, real, whole
from metafocus.errors import ProblemError
from metafocus.solvers.clipping import Clip
from metafocus.types import Params


@dataclass(frozen=True)
class per_step:
    """A learning rate that depends on the number of the inner step: schedules and MAML++.

    `lr_t = fn(outer, t)` for `t = 0, 1, ..., steps - 1`; the same `t` when a step is rebuilt in
    a backward pass or belongs to the tail of a truncated unroll.

    Args:
        fn: `(outer, step) -> rate`: a number, a scalar tensor, or one for each fast weight (a
            number, or a tensor that broadcasts against it).

    Raises:
        ProblemError: if `fn` is not such a function; at that step, if `fn` indexes a table that is
            too short.

    Example:
        >>> warm_up = SGD(per_step(lambda outer, t: 0.1 * min(1.0, (t + 1) / 3)), steps=5)
        >>> learned = SGD(per_step(lambda outer, t: outer["lr"][t]), steps=5)

    How to train your MAML (arXiv 1810.09502, section 4) learns one rate per layer and step:
    `per_step(lambda outer, t: {k: outer["lr"][i, t] for i, k in enumerate(names)})`.
    """

    fn: Callable[[Params, int], float | Tensor | Params]

    def __post_init__(self) -> None:
        function("fn", self.fn, "(outer, step) -> rate", 2)

    def at(self, outer: Params, step: int) -> Any:
        """Return the rate of step number `step`, counted from 0."""
        try:
            return self.fn(outer, step)
        except IndexError as error:
            raise ProblemError(
                f"lr has no entry for inner step {step} (counted from 0): {error}. Give it one "
                "entry for each of the solver's steps, or take fewer steps."
            ) from error


Rate = float | Callable[[Params], Tensor | Params] | per_step
"""A learning rate: a number, a function of the outer parameters, or `per_step(fn)`."""


def check_settings(lr: Rate, steps: int, weight_decay: float, clip: Clip | None) -> None:
    """Raise for an argument of every optimiser that is out of its range."""
    if isinstance(lr, type):
        function("lr", lr, "of the outer parameters, or a number")
    if not callable(lr) and not isinstance(lr, per_step):
        real("lr", lr, " >= 0 or a function of the outer parameters")
        if not lr >= 0:
            raise ValueError(
                f"lr must be a number >= 0 or a function of the outer parameters, got {lr}."
            )
    whole("steps", steps, note=" (0: no adaptation)")
    not_negative("weight_decay", weight_decay)
    if clip is not None:
        function("clip", clip, "of the gradients, such as mf.clip_global(1.0)")


def rates(lr: Rate, outer: Params, params: Params, step: int) -> dict[str, Any]:
    """Return the learning rate of every fast weight at one step.

    Raises:
        ProblemError: if `lr` gives neither a scalar nor a dict with every fast weight, or a
            tensor that does not broadcast against its fast weight.
    """
    if isinstance(lr, per_step):
        value = lr.at(outer, step)
    else:
        value = lr(outer) if callable(lr) else lr
    if not isinstance(value, dict):
        if isinstance(value, Tensor) and value.ndim:
            raise ProblemError(
                f"lr(outer) must return a scalar or a dict of rates, got shape "
                f"{list(value.shape)}. One rate per step: "
                "mf.per_step(lambda outer, step: outer[name][step])."
            )
        return dict.fromkeys(params, value)
    if set(value) != set(params):
        odd = sorted(set(value) ^ set(params))
        raise ProblemError(
            f"lr(outer) must return one rate for each fast weight; {odd[0]!r} is on one side "
            f"only. Fast weights: {sorted(params)}."
        )
    for k, v in value.items():
        if isinstance(v, Tensor) and not _broadcasts(v.shape, params[k].shape):
            raise ProblemError(
                f"lr(outer)[{k!r}] has shape {list(v.shape)}, which does not broadcast to its "
                f"fast weight of shape {list(params[k].shape)}. A table with one row per step "
                "wants mf.per_step."
            )
    return value


def _broadcasts(small: torch.Size, large: torch.Size) -> bool:
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(a in (1, b) for a, b in pairs)
