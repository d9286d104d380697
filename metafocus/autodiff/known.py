"""A scalar whose gradient is known already, and that is computed again for higher derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus.autodiff.grad import pullback
from metafocus.calls import Call, attempt, current
from metafocus.errors import ProblemError
from metafocus.torch_internals import transforming


def with_gradient(
    value: Tensor,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    again: Callable[..., Tensor],
) -> Tensor:
    """Return `value` with the gradient `grads` by `inputs`.

    A derivative of that gradient calls `again(*inputs)` and differentiates that twice.

    Raises:
        ProblemError: for such a derivative, if `again` returns another value.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> y = with_gradient(torch.tensor(9.0), [torch.tensor(6.0)], [x], lambda x: x**2)
        >>> (slope,) = torch.autograd.grad(y, x, create_graph=True)
        >>> torch.autograd.grad(slope, x)
        (tensor(2.),)
    """
    known = _Known(value.detach(), grads, again, current())
    return _Value.apply(known, *inputs)


class _Known(NamedTuple):
    value: Tensor
    grads: Sequence[Tensor | None]
    again: Callable[..., Tensor]
    call: Call | None

    def slope(self, cotangent: Tensor, *inputs: Tensor) -> list[Tensor | None]:
        """Compute the gradient anew, in a form that has derivatives of its own."""

        def again(*xs: Tensor) -> list[Tensor]:
            value = self.again(*xs)
            _check_same(self.value, value.detach())
            return [value]

        return pullback(again, inputs, [cotangent], [True] * len(inputs))


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, known: _Known, *inputs: Tensor) -> Tensor:
        ctx.known = known
        ctx.save_for_backward(*inputs)
        return known.value.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (cotangent,), inputs = cotangents, ctx.saved_tensors
        if transforming():
            with attempt(call=ctx.known.call):
                return None, *ctx.known.slope(cotangent, *inputs)
        return None, *_Slope.apply(ctx.known, cotangent, *inputs)


class _Slope(torch.autograd.Function):
    """The gradient times a cotangent: known, until somebody differentiates it."""

    @staticmethod
    def forward(ctx: Any, known: _Known, cotangent: Tensor, *inputs: Tensor) -> Any:
        ctx.known = known
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cotangent, *inputs)
        return tuple(None if g is None else cotangent * g for g in known.grads)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs = ctx.saved_tensors
        with attempt(call=ctx.known.call):
            return None, *pullback(ctx.known.slope, inputs, cotangents, [True] * len(inputs))


def _check_same(before: Tensor, after: Tensor) -> None:
    # Kernels that add in any order differ in the last digits.
    if not torch.allclose(before, after, rtol=torch.finfo(before.dtype).eps ** 0.5, equal_nan=True):
        raise ProblemError(
            f"the loss was {before.item()} and, run again for a second derivative, is "
            f"{after.item()}: it draws from a generator of its own, or a stream is not pure. Draw "
            "beforehand, or run all tasks in one chunk (chunk_size=None)."
        )
