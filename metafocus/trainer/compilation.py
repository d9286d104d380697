"""`torch_compile=True`: layers without fast weights are compiled, for first-order steps only."""

from __future__ import annotations

from typing import Any

from torch import nn

from metafocus.adapters import slots
from metafocus.errors import ProblemError
from metafocus.estimators import Estimator, FirstOrder


def compile_below(model: nn.Module, adapter: Any, estimator: Estimator, **options: Any) -> int:
    """Compile, in place, the decoder layers that hold no fast weights.

    The layers that hold some stay as they are: torch reuses the compiled code of one layer for the
    next without looking at its hooks, and so would not see the fast weights at all.

    Args:
        model: with `_no_split_modules`, as transformers' models have.
        adapter: whose modules are left alone.
        estimator: first order only: compiled code cannot be differentiated twice.
        options: of `torch.nn.Module.compile`: `backend`, `mode`.

    Returns:
        How many layers were compiled.

    Raises:
        ProblemError: for an estimator that needs second derivatives.
    """
    if not isinstance(estimator, FirstOrder):
        raise ProblemError(
            f"torch_compile=True with {estimator}: compiled code cannot be differentiated twice. "
            "Use FirstOrder(), or leave torch_compile off."
        )
    names = set(getattr(model, "_no_split_modules", None) or ())
    modules = dict(model.named_modules())
    for path in adapter.modules(model):
        slots.slot(modules[path])
    fast = tuple(adapter.modules(model))
    compiled = 0
    for path, module in modules.items():
        if type(module).__name__ not in names or any(f.startswith(f"{path}.") for f in fast):
            continue
        module.compile(**options)
        compiled += 1
    return compiled
