"""The meta-loss on several processes: inside the forward pass of DDP, and on sharded weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from metafocus.calls import ABSENT, changed
from metafocus.errors import ProblemError
from metafocus.torch_internals import uncompiled
from metafocus.trainer.parametrised import parametrise, whole_state

__all__ = ["parametrise", "through", "whole_state"]

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
