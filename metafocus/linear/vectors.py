"""What linear solvers share: fast weights as one vector, checks of their settings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from metafocus.types import Params


def flattening(like: Params) -> tuple[Callable[[Params], Tensor], Callable[[Tensor], Params]]:
    """Return a function from fast weights of these shapes to one vector, and its inverse."""
    if len(like) == 1:
        ((name, only),) = like.items()
        return lambda v: v[name].reshape(-1), lambda v: {name: v.reshape(only.shape)}
    sizes = [v.numel() for v in like.values()]

    def flat(v: Params) -> Tensor:
        return torch.cat([v[k].reshape(-1) for k in like]) if like else torch.zeros(0)

    def unflat(v: Tensor) -> Params:
        parts = v.split(sizes)
        # Mixed types were promoted to the widest.
        return {k: p.reshape(like[k].shape).to(like[k]) for k, p in zip(like, parts, strict=True)}

    return flat, unflat


def check(steps: int, damping: float, name: str = "steps") -> None:
    """Raise for arguments that no linear solver accepts."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {steps!r}.")
    if not damping >= 0 or math.isinf(damping):
        raise ValueError(f"damping must be {'finite' if damping > 0 else '>= 0'}, got {damping}.")


def positive(name: str, value: float) -> None:
    """Raise unless a value is positive and finite."""
    if not value > 0 or math.isinf(value):
        raise ValueError(f"{name} must be {'finite' if value > 0 else 'positive'}, got {value}.")
