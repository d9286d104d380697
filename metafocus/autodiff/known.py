"""A scalar whose gradient is known already, and that is computed again for higher derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metafocus.autodiff.grad import pullback
from metafocus.calls import attempt, current
from metafocus.errors import ProblemError


def with_gradient(
    value: Tensor,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    again: Callable[..., Tensor],
) -> Tensor:
    """Return `value` with the gradient `grads` by `inputs`.

    A backward pass that is differentiated itself calls `again(*inputs)` and differentiates that.

    Raises:
        ProblemError: in such a backward pass, if `again` returns another value.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> y = with_gradient(torch.tensor(9.0), [torch.tensor(6.0)], [x], lambda x: x**2)
        >>> (slope,) = torch.autograd.grad(y, x, create_graph=True)
        >>> torch.autograd.grad(slope, x)
        (tensor(2.),)
    """
    return _Known.apply(value, grads, again, *inputs)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        grads: Sequence[Tensor | None],
        again: Callable[..., Tensor],
        *inputs: Tensor,
    ) -> Tensor:
        ctx.value, ctx.grads, ctx.again = value.detach(), grads, again
        ctx.call = current()
        ctx.save_for_backward(*inputs)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (cotangent,) = cotangents
        if not torch.is_grad_enabled():
            return *[None] * 3, *(None if g is None else cotangent * g for g in ctx.grads)
        inputs = ctx.saved_tensors

        def again(*xs: Tensor) -> list[Tensor]:
            value = ctx.again(*xs)
            _check_same(ctx.value, value.detach())
            return [value]

        with attempt(call=ctx.call):
            return *[None] * 3, *pullback(again, inputs, [cotangent], [True] * len(inputs))


def _check_same(before: Tensor, after: Tensor) -> None:
    # Kernels that add in any order differ in the last digits.
    if not torch.allclose(before, after, rtol=torch.finfo(before.dtype).eps ** 0.5, equal_nan=True):
        raise ProblemError(
            f"the loss was {before.item()} and, run again for a second derivative, is "
            f"{after.item()}: it draws from a generator of its own, or a stream is not pure. Draw "
            "beforehand, or run all tasks in one chunk (chunk_size=None)."
        )
