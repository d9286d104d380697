"""`torch_compile=True`: layers without fast weights are compiled, for first-order steps only."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments

from metafocus.adapters import slots
from metafocus.errors import ProblemError
from metafocus.estimators import Estimator, FirstOrder


def compile_below(
    model: nn.Module, adapter: Any, estimator: Estimator, args: TrainingArguments
) -> None:
    """Compile, in place, the decoder layers that hold no fast weights.

    The layers that hold some stay as they are: torch reuses the compiled code of one layer for the
    next without looking at its hooks, and so would not see the fast weights at all.

    Args:
        model: with `_no_split_modules`, as transformers' models have.
        adapter: whose modules are left alone.
        estimator: first order only: compiled code cannot be differentiated twice.
        args: of the Trainer, whose back end and mode are used.

    Raises:
        ProblemError: for an estimator that needs second derivatives.
    """
    if not isinstance(estimator, FirstOrder):
        raise ProblemError(
            f"torch_compile=True with {estimator}: compiled code cannot be differentiated twice. "
            "Use FirstOrder(), or leave torch_compile off."
        )
    options: dict[str, Any] = {"backend": args.torch_compile_backend or "inductor"}
    if args.torch_compile_mode:
        options["mode"] = args.torch_compile_mode
    names = set(getattr(model, "_no_split_modules", None) or ())
    modules = dict(model.named_modules())
    for path in adapter.modules(model):
        slots.slot(modules[path])
    fast = tuple(adapter.modules(model))
    for path, module in modules.items():
        if type(module).__name__ in names and not any(f.startswith(f"{path}.") for f in fast):
            module.compile(**options)
