"""The meta-loss on wrapped models: inside the forward pass of DDP, and on what FSDP2 sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from metafocus.calls import ABSENT, changed
from metafocus.engine import MetaLoss, bilevel
from metafocus.errors import ProblemError
from metafocus.estimators import Estimator
from metafocus.recipes._focusft import focusft_problem
from metafocus.torch_internals import uncompiled
from metafocus.types import Solver

Result = TypeVar("Result")


def through(wrapper: nn.Module, fn: Callable[[Any], Result], argument: Any) -> Result:
    """Return `fn(argument)`, computed inside `wrapper`'s forward pass if it is a DDP wrapper.

    DDP averages gradients only for a backward pass whose forward pass it has seen: a loss that is
    computed on `wrapper.module` leaves the ranks to diverge, silently. Here the whole meta-loss,
    inner loop included, is one forward pass of the wrapper, so that its hooks are armed exactly
    once. The inner loop asks for gradients of fast weights only, which are no parameters: it
    triggers no communication.

    For the length of the call the module's `forward` is an entry, in which the true one is back.

    Args:
        wrapper: what accelerate made of the model: the model itself, a `DistributedDataParallel`
            of it, or a compiled module around either.
        fn: computes a loss with the unwrapped model.
        argument: of `fn`; DDP moves its tensors to the module's device.

    Raises:
        ProblemError: for `DataParallel`, which copies the model and so loses its fast weights.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> through(model, lambda x: model(x).shape, torch.ones(3, 2))
        torch.Size([3, 1])
    """
    wrapper = uncompiled(wrapper)
    if isinstance(wrapper, DataParallel):
        raise ProblemError(
            "torch.nn.DataParallel copies the model at every step, and fast weights do not follow. "
            "Start one process for each device: torchrun --nproc-per-node=N script.py, or hide all "
            "devices but one with CUDA_VISIBLE_DEVICES."
        )
    if not isinstance(wrapper, DistributedDataParallel):
        return fn(argument)
    module = wrapper.module
    # Accelerate keeps its mixed-precision forward there.
    own = module.__dict__.get("forward", ABSENT)

    def entry(argument: Any) -> Result:
        with changed((module, "forward", own)):
            return fn(argument)

    with changed((module, "forward", entry)):
        return wrapper(argument)


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
