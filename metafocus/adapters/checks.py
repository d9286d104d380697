"""Checks of the arguments of every adapter: a placement, its modules, and fast weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from metafocus.adapters.placement import read_directly
from metafocus.errors import PlacementError, ProblemError


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


def placed(adapter: str, where: Any, model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that a placement names in a model, by path, in its order.

    Raises:
        PlacementError: If the placement returns no tuple or list of strings (a single string would
            be taken letter by letter), or names a module twice or one that does not exist.

    Example:
        >>> list(placed("LoRA", lambda model: ["0"], nn.Sequential(nn.Linear(2, 2))))
        ['0']
    """
    paths, modules = where(model), dict(model.named_modules())
    if not isinstance(paths, tuple | list) or not all(isinstance(path, str) for path in paths):
        raise PlacementError(
            f"{adapter}: the placement returned {paths!r}; it must return a tuple of module paths"
        )
    if len(set(paths)) < len(paths):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise PlacementError(f"{adapter}: {where!r} names {twice} more than once")
    for path in paths:
        if path not in modules:
            raise PlacementError(
                f"{adapter}: {type(model).__name__} has no module {path!r}, which {where!r} names"
            )
    direct = [path for path in paths if read_directly(model, path)]
    if direct:
        way = "leave it out (all_linear does)"
        if direct[0].endswith(".base_layer"):
            way = "place them elsewhere, or train an adapter that only adds, such as plain LoRA"
        raise PlacementError(
            f"{adapter}: {where!r} names {direct[0]!r}, whose weight {type(model).__name__} reads "
            "without calling the module, so fast weights there would have no effect, or a wrong "
            f"one: {way}"
        )
    return {path: modules[path] for path in paths}


def check_fast(adapter: str, fast: Any, expected: Collection[str]) -> None:
    """Raise unless `fast` is a mapping from the expected names to floating-point tensors.

    Example:
        >>> check_fast("LoRA", {}, ())
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
    missing, unknown = sorted(set(expected) - set(fast)), sorted(set(fast) - set(expected))
    if missing or unknown:
        raise ProblemError(
            f"{adapter}: fast weights of another model or placement: missing {missing[:6]} "
            f"({len(missing)}), unknown {unknown[:6]} ({len(unknown)}); make them with "
            "init(model) of this adapter"
        )
