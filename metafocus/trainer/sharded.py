"""FocuSFT on a model that FSDP2 has sharded."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from metafocus.engine import MetaLoss, bilevel
from metafocus.errors import ProblemError
from metafocus.estimators import Estimator
from metafocus.recipes._focusft import focusft_problem
from metafocus.types import Solver


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to the model.

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    return isinstance(model, FSDPModule)


def focusft_sharded(
    model: nn.Module,
    *,
    solver: Solver,
    estimator: Estimator,
    per_example: bool = False,
    **settings: Any,
) -> MetaLoss:
    """Return `recipes.focusft` for a sharded model: its parameters are closed over, not passed.

    FSDP gathers a layer's parameters into the module just before it runs, which undoes a swap by
    `functional_call`; passed explicitly, the parameters would be shards. So only estimators that
    ride on the tape work: `FirstOrder()` as it is, `Unrolled()` (without `recompute`) if every
    module was sharded with `reshard_after_forward=False`, with `set_reshard_after_backward(False)`
    on the model, and `reshard()` is called on every module after the backward pass.

    Args:
        model: sharded by `fully_shard`.
        solver: the inner optimiser.
        estimator: of the tape.
        per_example: must be False.
        settings: of `mf.recipes.focusft`.

    Returns:
        `meta_loss({}, episode) -> (loss, Aux)`.

    Raises:
        ProblemError: for fast weights per example; at the first call, for an estimator that needs
            explicit parameters.
    """
    if per_example:
        raise ProblemError(
            "per_example=True is not supported under FSDP. Use per_device_train_batch_size=1, "
            "where shared fast weights are those of the example, with gradient_accumulation_steps; "
            "or DDP."
        )
    problem = focusft_problem(model, **settings)
    return bilevel(problem, solver=solver, estimator=estimator)
