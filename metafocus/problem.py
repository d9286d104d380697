"""The bilevel problem: four functions and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus.errors import NonFiniteError, ProblemError
from metafocus.types import Episode, InnerLoss, Params


@dataclass(frozen=True)
class Problem:
    """A bilevel problem: minimise `outer_loss(fast*(slow), slow, query)` over `slow`.

    `fast*(slow)` is what an inner solver makes of `inner_loss(., slow, support)`, started at
    `init(slow)`.

    Attributes:
        inner_loss: `(fast, slow, support) -> scalar`.
        outer_loss: `(fast, slow, query) -> scalar`.
        init: `slow -> fast` before the first step. MAML: `lambda slow: slow`.
        prepare: `(slow, episode) -> episode`, computed once per outer step and shared by both
            levels: what does not depend on the fast weights.

    Raises:
        ProblemError: if a loss or `init` is no function.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).mean()
        >>> maml = mf.Problem(loss, loss, init=lambda slow: slow)
    """

    inner_loss: InnerLoss
    outer_loss: InnerLoss
    init: Callable[[Params], Params]
    prepare: Callable[[Params, Episode], Episode] | None = None

    def __post_init__(self) -> None:
        for name in ("inner_loss", "outer_loss", "init"):
            if not callable(getattr(self, name)):
                raise ProblemError(
                    f"{name} must be a function, got {type(getattr(self, name)).__name__}."
                )

    def start(self, outer: Params) -> Params:
        """Return `init(outer)`, checked to be a dict of floating-point tensors."""
        fast = self.init(outer)
        check_params(fast, "init", "fast weights")
        return fast

    def prepared(self, outer: Params, episode: Any) -> Episode:
        """Return the episode as `prepare` makes it."""
        episode = as_episode(episode)
        if self.prepare is None:
            return episode
        return as_episode(self.prepare(outer, episode), "prepare")


def as_episode(value: Any, source: str = "episode") -> Episode:
    """Return a pair as an `Episode`.

    A tensor of two rows or a dict of two entries could be taken apart as well, silently wrong.

    Raises:
        ProblemError: if it is no tuple or list of two.

    Example:
        >>> as_episode((1, 2))
        Episode(support=1, query=2)
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        size = f" of {len(value)}" if hasattr(value, "__len__") else ""
        got = type(value).__name__ + size
        verb = "return" if source == "prepare" else "be"
        raise ProblemError(f"{source} must {verb} mf.Episode(support, query), got {got}.")
    return Episode(*value)


def proximal(inner_loss: InnerLoss, strength: float) -> InnerLoss:
    """Return `inner_loss + strength / 2 * |fast - slow|^2` (iMAML, arXiv 1909.04630).

    `slow` must hold every key of `fast`.

    Raises:
        ValueError: if `strength` is negative.
        ProblemError: at the first call, if a fast weight has no counterpart in `slow`.

    Example:
        >>> loss = proximal(lambda fast, slow, _: (fast["w"] ** 2).sum(), strength=2.0)
        >>> w = {"w": torch.tensor([1.0])}
        >>> loss(w, {"w": torch.tensor([0.0])}, None)
        tensor(2.)
    """
    if not strength >= 0 or math.isinf(strength):
        allowed = "finite" if strength > 0 else ">= 0"
        raise ValueError(f"strength must be {allowed}, got {strength}.")

    def loss(fast: Params, slow: Params, support: Any) -> Tensor:
        missing = sorted(set(fast) - set(slow))
        if missing:
            raise ProblemError(
                f"proximal pulls every fast weight to the slow weight of the same name; slow has "
                f"no {missing[0]!r}. Return those names from init."
            )
        value = inner_loss(fast, slow, support)
        for k, v in fast.items():
            value = value + strength / 2 * ((v - slow[k]) ** 2).sum()
        return value

    return loss


def check_params(params: Any, source: str, noun: str) -> None:
    """Raise unless `params` is a dict from names to floating-point tensors."""
    if not isinstance(params, dict):
        raise ProblemError(
            f"{source} must be a dict of tensors ({noun} by name), got {type(params).__name__}."
            " From a module: dict(module.named_parameters())."
        )
    for name, value in params.items():
        if not isinstance(value, Tensor):
            raise ProblemError(
                f"{source} holds {name!r} of type {type(value).__name__}; {noun} are tensors."
            )
        if not value.is_floating_point():
            raise ProblemError(
                f"{source} holds {name!r} of dtype {value.dtype}; only floating-point tensors can"
                " be differentiated. Close over integer tensors, or put them into the episode."
            )


def check_finite(losses: Tensor) -> None:
    """Raise if an inner loss is NaN or infinite; one host synchronisation."""
    bad = ~torch.isfinite(losses)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        value = losses[tuple(where)].item()
        place = f"step {where[-1]}" if len(where) == 1 else f"task {where[0]}, step {where[-1]}"
        raise NonFiniteError(
            f"inner_loss is {value} before inner {place}. Lower the solver's lr, clip its "
            "gradients (clip=mf.clip_global(1.0)), or look at the support data."
        )
