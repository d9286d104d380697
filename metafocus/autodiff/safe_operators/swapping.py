"""Operators whose fused kernels lack a derivative that an estimator needs, as exact composites.

One scoped mechanism: `differentiable_twice(loss)` evaluates a loss with the operators of the
table swapped, each only where the fused kernel would fail or, worse, be silently wrong:

* attention: no fused kernel has a double backward or forward mode;
* cdist, pdist, hardsigmoid: no double backward;
* cross-entropy: right, but with a detour in its double backward;
* linear cross-entropy in chunks: the second derivative is lost without an error;
* batch, instance and layer norm: silently wrong (torch 2.13) from the third derivative on, that is
  in the second derivative of a meta loss, because their formulas hold the saved statistics
  constant; for the same reason already in the second, where `vmap` takes these formulas apart;
* weight norm: silently wrong from the second derivative on;
* embedding with a padding index: wrong under `vmap` inside a gradient of a gradient;
* silu, mish, group norm, mse, huber and soft margin loss: no forward-mode formula;
* `no_grad()` and `.data`: what they cut off is cut off from forward mode and from every transform.

First-order estimators do not use this mechanism and keep the fused kernels.
"""

from __future__ import annotations

import functools
import inspect
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
from metafocus.calls import note
from metafocus.errors import TransformError
from metafocus.torch_internals import forward_levels, function_modes, transforming


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Compute like `F.linear_cross_entropy`, without the chunks that lose second derivatives."""
    return cross_entropy(
        F.linear(input, linear_weight, linear_bias),
        target,
        weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


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
_LINEAR_CROSS_ENTROPY = getattr(F, "linear_cross_entropy", None)  # torch 2.13
if _LINEAR_CROSS_ENTROPY is not None:
    _WRONG[_LINEAR_CROSS_ENTROPY] = _linear_cross_entropy
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

_READ_DATA: Any = Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]
_CUT_OFF = {_READ_DATA, torch_internals.set_grad_mode}
_TABLES = frozenset({Tensor.add_, Tensor.__float__, Tensor.requires_grad_}).union(
    _ALWAYS, _WRONG, _WRONG_IN_TRANSFORMS, _IN_FORWARD_MODE, _CUT_OFF
)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """Normalise like `F.batch_norm`; with the statistics of the batch, leave the running ones."""
    running = (None, None) if training else (running_mean, running_var)
    return F.batch_norm(input, *running, weight, bias, training, *rest, **options)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """Normalise like `F.instance_norm`; with the input's statistics, leave the running ones."""
    running = (None, None) if use_input_stats else (running_mean, running_var)
    return F.instance_norm(input, *running, weight, bias, use_input_stats, *rest, **options)


_WITH_STATISTICS = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch.batch_norm: lambda x, w, b, mean, var, *rest: _batch_norm(x, mean, var, w, b, *rest[:-1]),
    torch.instance_norm: lambda x, w, b, mean, var, *rest: _instance_norm(
        x, mean, var, w, b, *rest[:-1]
    ),
}


def _requires_grad(x: Tensor, requires_grad: bool = True) -> Tensor:
    try:
        return x.requires_grad_(requires_grad)
    except RuntimeError as error:
        raise TransformError(
            "the loss calls requires_grad_() to build a graph of its own, which torch does not "
            "allow inside torch.func.grad and jvp. Use torch.func.grad inside the loss, or a tape "
            "estimator: Unrolled() or Unrolled(recompute=True) outside transforms."
        ) from error


_RUNNING_MEAN = {F.batch_norm: 1, F.instance_norm: 1, torch.batch_norm: 3, torch.instance_norm: 3}
"""The place of the running mean among the arguments."""


def _needed(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a first derivative needs the block: running statistics, chunked loss."""
    if func not in _RUNNING_MEAN:
        return func is _LINEAR_CROSS_ENTROPY
    place = _RUNNING_MEAN[func]
    given = args[place] if len(args) > place else (kwargs or {}).get("running_mean")
    return given is not None


def _counts_batches() -> bool:
    """Return whether a batch norm module is counting the batches that it has seen."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame and frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == "torch.nn.modules.batchnorm"


class Swapped(TorchFunctionMode):
    """Inside this block, operators of the table are swapped where they need to be.

    Batch norm in training mode leaves its running statistics as they are: an evaluation of a loss
    inside an estimator must not change the module.

    Args:
        once: what is inside is differentiated once, unless a transform is active: swap only
            there, and only what would be silently wrong.

    Attributes:
        needed: whether the loss used an operator that needs this block even for a first derivative.
    """

    def __init__(self, once: bool = False):
        super().__init__()
        self.once = once
        self.needed: bool = False
        self.modes: torch_internals.GradModes = torch_internals.GradModes()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every access to a tensor comes here: what is in no table must pass quickly.
        if func in _TABLES:
            if func is Tensor.add_:
                if _counts_batches():
                    return args[0]
            elif func is Tensor.__float__:
                # A cumulative average divides by the number of batches, which was not counted.
                return float(args[0].item() + _counts_batches())
            elif func is Tensor.requires_grad_:
                func = _requires_grad
            elif func is torch_internals.set_grad_mode:
                return self.modes.set(*args)
            elif func == _READ_DATA:
                func = Tensor.detach
            else:
                self.needed |= _needed(func, args, kwargs)
                composite = self._composite(func)
                if composite is not func:
                    note("operators", _replaced(func, composite))
                func = composite
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
        return _WITH_STATISTICS.get(func, func)


def _replaced(func: Any, composite: Any) -> str:
    statistics = composite is _WITH_STATISTICS.get(func)
    what = "leaves its running statistics alone" if statistics else "replaced by an exact composite"
    return f"{func.__name__}: {what}"


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
    return _inside(loss, once=False)


def differentiable_once(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss evaluated for a first derivative: fused kernels stay, statistics too."""
    return _inside(loss, once=True)


def _inside(loss: Callable[..., Tensor], *, once: bool) -> Callable[..., Tensor]:
    @functools.wraps(loss)
    def swapped(*args: Any) -> Tensor:
        with Swapped(once):
            return loss(*args)

    return swapped
