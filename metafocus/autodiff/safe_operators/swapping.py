"""Operators whose fused kernels lack a derivative that an estimator needs, as exact composites.

One scoped mechanism: `differentiable_twice(loss)` evaluates a loss with the operators of the
table swapped, each only where the fused kernel would fail or, worse, be silently wrong:

* attention: no fused kernel has a double backward or forward mode;
* cdist, pdist, hardsigmoid: no double backward;
* cross-entropy: right, but with a detour in its double backward;
* batch, instance and layer norm: silently wrong (torch 2.13) from the third derivative on, that is
  in the second derivative of a meta loss, because their formulas hold the saved statistics
  constant; for the same reason already in the second, where `vmap` takes these formulas apart;
* weight norm: silently wrong from the second derivative on;
* embedding with a padding index: wrong under `vmap` inside a gradient of a gradient;
* silu, mish, group norm, mse, huber and soft margin loss: no forward-mode formula.

First-order work never comes here and keeps the fused kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metafocus import torch_internals
from metafocus.autodiff.safe_operators import (
    attention,
    batch_norm,
    cdist,
    cross_entropy,
    embedding,
    group_norm,
    hardsigmoid,
    huber_loss,
    instance_norm,
    layer_norm,
    mish,
    mse_loss,
    multi_head_attention,
    pdist,
    silu,
    soft_margin_loss,
    weight_norm,
)
from metafocus.autodiff.safe_operators.autocast import in_float32
from metafocus.errors import TransformError
from metafocus.torch_internals import forward_levels, function_modes, transforming


def _no_ctc_loss(*args: Any, **kwargs: Any) -> Tensor:
    raise TransformError(
        "ctc_loss has no second derivative in torch and does not run under torch.func, so this "
        "estimator cannot differentiate an inner loss with it. Use FirstOrder()."
    )


_ALWAYS = {
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head_attention,
    F.hardsigmoid: hardsigmoid,
    torch.cdist: in_float32(cdist),
    F.pdist: in_float32(pdist),
    F.ctc_loss: _no_ctc_loss,
    F.cross_entropy: cross_entropy,
}
_WRONG = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: in_float32(layer_norm, ("cuda",)),
    torch_internals.weight_norm: weight_norm,
    # What these call, with arguments in another order.
    torch.batch_norm: lambda x, w, b, mean, var, *rest: batch_norm(x, mean, var, w, b, *rest),
    torch.instance_norm: lambda x, w, b, mean, var, *rest: instance_norm(x, mean, var, w, b, *rest),
    torch.layer_norm: in_float32(layer_norm, ("cuda",)),
}
_WRONG_IN_TRANSFORMS = {
    F.embedding: embedding,
    torch.embedding: lambda weight, input, padding_idx=-1, *rest: embedding(
        input, weight, padding_idx if padding_idx >= 0 else None, None, 2.0, *rest
    ),
}
_IN_FORWARD_MODE = {
    F.silu: silu,
    F.mish: mish,
    F.group_norm: in_float32(group_norm, ("cuda",)),
    F.mse_loss: in_float32(mse_loss),
    F.huber_loss: in_float32(huber_loss),
    F.soft_margin_loss: in_float32(soft_margin_loss),
}

_TABLES = frozenset().union(_ALWAYS, _WRONG, _WRONG_IN_TRANSFORMS, _IN_FORWARD_MODE)


class Swapped(TorchFunctionMode):
    """Inside this block, operators of the table are swapped where they need to be.

    Args:
        once: what is inside is differentiated once, unless a transform is active: swap only
            there, and only what would be silently wrong.
    """

    def __init__(self, once: bool = False):
        super().__init__()
        self.once = once

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every access to a tensor comes here: what is in no table must pass quickly.
        if func in _TABLES:
            func = self._composite(func)
        return func(*args, **kwargs) if kwargs else func(*args)

    def _composite(self, func: Any) -> Any:
        if not self.once and func in _ALWAYS:
            return _ALWAYS[func]
        if func in _WRONG and (not self.once or transforming()):
            return _WRONG[func]
        if func in _WRONG_IN_TRANSFORMS and transforming():
            return _WRONG_IN_TRANSFORMS[func]
        if not self.once and func in _IN_FORWARD_MODE and forward_levels():
            return _IN_FORWARD_MODE[func]
        return func


def active() -> Swapped | None:
    """Return the innermost block in which operators are being swapped, if any."""
    return next((mode for mode in reversed(function_modes()) if isinstance(mode, Swapped)), None)


def differentiable_twice(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss evaluated with composites where a second derivative needs them.

    Example:
        >>> loss = differentiable_twice(lambda x: F.mse_loss(x, torch.zeros(1)))
        >>> torch.func.jvp(torch.func.grad(loss), (torch.ones(1),), (torch.ones(1),))[1]
        tensor([2.])
    """

    @functools.wraps(loss)
    def swapped(*args: Any) -> Tensor:
        with Swapped():
            return loss(*args)

    return swapped
