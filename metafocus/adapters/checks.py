"""Checks of the arguments of every adapter: a placement, its paths, and fast weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metafocus.errors import PlacementError, ProblemError

MOST = 2**16
"""The largest rank; guards against typos in `rank`."""


def check_where(adapter: str, where: Any) -> None:
    """Raise unless `where` is a function.

    Raises:
        PlacementError: If it is not a function, such as a name or a tuple of names.

    Example:
        >>> check_where("LoRA", "up_proj")
        Traceback (most recent call last):
        metafocus.errors.PlacementError: LoRA(where='up_proj') must be a placement, a function \
from a model to module paths, such as top_layers(0.35, ('up_proj',)) or matching('.*up_proj')
    """
    if not callable(where):
        raise PlacementError(
            f"{adapter}(where={where!r}) must be a placement, a function from a model to module "
            "paths, such as top_layers(0.35, ('up_proj',)) or matching('.*up_proj')"
        )


def checked_paths(adapter: str, where: Any, paths: Any) -> tuple[str, ...]:
    """Return the paths that a placement returned.

    Raises:
        PlacementError: If they are not a tuple or list of strings. A single string would be read
            letter by letter.

    Example:
        >>> checked_paths("LoRA", None, ["0", "1"])
        ('0', '1')
    """
    if not isinstance(paths, tuple | list) or not all(isinstance(path, str) for path in paths):
        raise PlacementError(
            f"{adapter}: the placement returned {paths!r}; it must return a tuple of module paths"
        )
    return tuple(paths)


def check_tensors(adapter: str, fast: Any) -> None:
    """Raise unless `fast` is a mapping from names to floating-point tensors.

    Raises:
        ProblemError: If it is not such a mapping.

    Example:
        >>> check_tensors("LoRA", {})
    """
    if not isinstance(fast, Mapping):
        raise ProblemError(
            f"{adapter}: fast weights are a dict of tensors, got {type(fast).__name__}; make them "
            "with init(model)"
        )
    for name, value in fast.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ProblemError(
                f"{adapter}: {name!r} is a {kind}; fast weights are floating-point tensors"
            )
