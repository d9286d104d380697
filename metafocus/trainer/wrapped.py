"""Run any function of a model as the forward pass of its DDP wrapper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from metafocus.errors import ProblemError
from metafocus.torch_internals import uncompiled

Result = TypeVar("Result")


def through(wrapper: nn.Module, fn: Callable[[Any], Result], argument: Any) -> Result:
    """Return `fn(argument)`, computed inside `wrapper`'s forward pass if it is a DDP wrapper.

    DDP averages gradients only for a backward pass whose forward pass it has seen: a loss that is
    computed on `wrapper.module` leaves the ranks to diverge, silently. Here the whole meta-loss,
    inner loop included, is one forward pass of the wrapper, so that its hooks are armed exactly
    once. The inner loop asks for gradients of fast weights only, which are no parameters: it
    triggers no communication.

    For the length of the call the module's `forward` is an entry that puts the true one back
    before anything else happens.

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
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is not None:
            module.forward = own
        else:
            module.__dict__.pop("forward", None)

    def entry(argument: Any) -> Result:
        restore()
        return fn(argument)

    module.forward = entry
    try:
        return wrapper(argument)
    finally:
        restore()
