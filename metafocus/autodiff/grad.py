"""First derivatives by two back ends that agree: the tape outside transforms, functorch inside.

`torch.func.grad` always builds the graph of a second derivative; `torch.autograd.grad` is faster
and lighter but does not exist inside `vmap`, `grad` or `jvp`. Everything here chooses by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.tape import foreign_leaves
from metafocus.checks import scalar
from metafocus.errors import TransformError
from metafocus.torch_internals import (
    VmapLevel,
    outside_transforms,
    pytree,
    sole_vmap,
    transforming,
)
from metafocus.types import Params


def vjp(fn: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """Return `fn(*primals)` and its pullback, by `torch.func`."""
    result = torch.func.vjp(fn, *primals)
    return result[0], result[1]


def pushforward(fn: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """Return `fn(*primals)` and a function from tangents of the primals to that of the value.

    Forward mode as the transpose of the pullback: torch.func.jvp would refuse to run below
    torch.autograd.forward_ad.
    """
    value, pull = vjp(fn, *primals)
    zeros = pytree.tree_map(torch.zeros_like, value)
    _, transpose = vjp(pull, zeros)
    return value, lambda *tangents: transpose(tangents)[0]


def leaf_alias(x: Tensor, track: bool) -> Tensor:
    """Return an alias of `x` that needs a derivative: of a constant, a leaf of the engine's own."""
    if track and x.requires_grad:
        return x.view_as(x)
    leaf = x.detach().requires_grad_()
    leaf.engine_leaf = True  # pyright: ignore[reportAttributeAccessIssue]
    return leaf


def reaches_another_leaf(value: Tensor, own: Sequence[Tensor] = ()) -> bool:
    """Return whether a value depends on a leaf that is not in `own` nor made by the engine."""
    return any(not hasattr(x, "engine_leaf") for x in foreign_leaves(value, own))


def value_and_grad(
    loss: Callable[[Params], Tensor], fast: Params, *, differentiable: bool, cut: bool = True
) -> tuple[Tensor, Params]:
    """Return `loss(fast)`, detached, and its gradient.

    With `differentiable`, the gradient can be differentiated again, also by everything that
    `loss` closes over; without, it is a constant. `cut=False` without `differentiable` is for a
    caller that passes constants and detaches the gradient itself.

    Raises:
        TransformError: in inference mode, where every gradient would be zero.
    """
    refuse_inference_mode()
    if transforming():
        vmap = sole_vmap()
        if vmap is not None:
            return _per_task(loss, fast, differentiable, vmap)
        cut = cut and not differentiable
        point = pt.detach(fast) if cut else fast
        grads, value = torch.func.grad_and_value(lambda p: scalar(loss(p), "inner_loss"))(point)
        return value.detach(), pt.detach(grads) if cut else grads
    track = differentiable and torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {k: leaf_alias(v, track) for k, v in fast.items()}
        value = scalar(loss(dict(leaves)), "inner_loss")
        grads = _grad([value], list(leaves.values()), None, create_graph=track)
    filled = [
        torch.zeros_like(x) if g is None else g for g, x in zip(grads, fast.values(), strict=True)
    ]
    return value.detach(), dict(zip(fast, filled, strict=True))


def refuse_inference_mode() -> None:
    """Raise in `torch.inference_mode()`, where every gradient would be zero."""
    if torch.is_inference_mode_enabled():
        raise TransformError(
            "torch.inference_mode() has no gradients, so the inner loop would not adapt. Use "
            "torch.no_grad() instead."
        )


def _per_task(
    loss: Callable[[Params], Tensor], fast: Params, differentiable: bool, vmap: VmapLevel
) -> tuple[Tensor, Params]:
    """Return value and gradient of every task of a `vmap` over the tape, by the tape.

    Task `i`'s loss depends on task `i`'s fast weights only, so the gradient of the sum holds the
    gradient of each; a backward pass outside `vmap` costs what its kernels cost.
    """
    plain = {k: vmap.outside(x) for k, x in fast.items()}
    track = differentiable and torch.is_grad_enabled()
    with torch.enable_grad():
        with outside_transforms():
            leaves = {k: leaf_alias(x, track) for k, x in plain.items()}
        value = loss({k: vmap.inside(x) for k, x in leaves.items()})
        value = vmap.outside(scalar(value, "inner_loss"))
        with outside_transforms():
            found = _grad([value.sum()], list(leaves.values()), None, create_graph=track)
            grads = [
                torch.zeros_like(x) if g is None else g
                for g, x in zip(found, leaves.values(), strict=True)
            ]
            value = value.detach()
    return vmap.inside(value), {k: vmap.inside(g) for k, g in zip(fast, grads, strict=True)}


def pullback(
    fn: Callable[..., Sequence[Any]],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return the vector-Jacobian product of `fn` for each input, None where not `wanted`.

    Outputs of `fn` that are not tensors are ignored.
    """
    chosen = [i for i, w in enumerate(wanted) if w and pt.is_differentiable(inputs[i])]

    def on_chosen(*xs: Tensor) -> Sequence[Tensor]:
        merged = list(inputs)
        for i, x in zip(chosen, xs, strict=True):
            merged[i] = x
        return fn(*merged)

    at = [inputs[i] for i in chosen]
    if transforming():
        # torch.func.vjp refuses outputs that have no derivative.
        kept: list[bool] = []

        def differentiable(*xs: Tensor) -> tuple[Tensor, ...]:
            ys = on_chosen(*xs)
            kept[:] = [isinstance(y, Tensor) and pt.is_differentiable(y) for y in ys]
            return tuple(y for y, keep in zip(ys, kept, strict=True) if keep)

        outputs, pull = vjp(differentiable, *at)
        given = [c for c, wants in zip(cotangents, kept, strict=True) if wants]
        filled = tuple(
            torch.zeros_like(y) if c is None else c for y, c in zip(outputs, given, strict=True)
        )
        grads: Sequence[Tensor | None] = pull(filled)
    else:
        track = torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = [leaf_alias(x, track) for x in at]
            pairs = [
                (y, c)
                for y, c in zip(on_chosen(*leaves), cotangents, strict=True)
                if c is not None and isinstance(y, Tensor) and y.requires_grad
            ]
            ys, cs = [y for y, _ in pairs], [c for _, c in pairs]
            grads = _grad(ys, leaves, cs, create_graph=track) if ys else [None] * len(leaves)
    result: list[Tensor | None] = [None] * len(inputs)
    for i, g in zip(chosen, grads, strict=True):
        result[i] = g
    return result


def pulled_through(
    outputs: Params, cotangents: Params, leaves: Sequence[Tensor], *, track: bool
) -> list[Tensor]:
    """Return the vector-Jacobian product of a graph that is kept for further products."""
    varying = [k for k, y in outputs.items() if y.requires_grad]
    if not (varying and leaves):
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(
        [outputs[k] for k in varying],
        leaves,
        [cotangents[k] for k in varying],
        retain_graph=True,
        create_graph=track,
        allow_unused=True,
    )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    *,
    create_graph: bool,
) -> Sequence[Tensor | None]:
    if not any(y.requires_grad for y in outputs):
        return [None] * len(inputs)
    return torch.autograd.grad(
        outputs, inputs, cotangents, create_graph=create_graph, allow_unused=True
    )
