"""Kernels without a second derivative: found in the graph of a loss and judged by one product.

The backward pass of a custom Function may return values without a graph, as Triton and CUDA
kernels do. A second derivative through it is then lost without an error. The graph of the loss is
searched for nodes that are not ATen's own. Only if there are any, one product with the second
derivative is compared with a central difference of the gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff import recompute
from metafocus.autodiff.hvp import evaluated_for, hvp_finite, hvp_reverse
from metafocus.autodiff.tape import foreign_nodes
from metafocus.calls import Scoped, note
from metafocus.errors import ProblemError
from metafocus.rng import replayed
from metafocus.types import InnerLoss, Params

TOLERANCE = 0.05
"""Largest relative difference between a product and a central difference. A kernel without a second
derivative loses whole terms; float32 rounding and curvature change a product by less."""

_TRUSTED = Scoped(False)


def trust() -> contextlib.AbstractContextManager[None]:
    """Accept kernels whose second derivative cannot be checked, inside a `with` block.

    The first call of a meta loss compares the second derivative through custom kernels with a
    central difference. Where this cannot be decided (half precision, kinks, random numbers of an
    own generator) the loss is refused, unless the call is made inside this block.

    Example:
        >>> import metafocus as mf
        >>> loss = lambda fast, slow, x: ((fast["w"] - x) ** 2).sum()
        >>> meta = mf.bilevel(
        ...     mf.Problem(loss, loss), solver=mf.SGD(0.1, steps=1), estimator=mf.Unrolled())
        >>> w = {"w": torch.ones(1, requires_grad=True)}
        >>> with mf.trust():
        ...     value, aux = meta(w, mf.Episode(torch.zeros(1), torch.zeros(1)))
    """
    return _TRUSTED.set(True)


def refuse_lost_second_derivatives(
    who: str,
    inner_loss: InnerLoss,
    fast: Params,
    slow: Params,
    data: Any,
    kernels: list[str] | None = None,
) -> None:
    """Raise if a second derivative of the loss is lost in a kernel, or if that cannot be decided.

    Args:
        who: the name of the loss.
        inner_loss: `(fast, slow, data) -> scalar`.
        fast: constants, as all arguments.
        slow: the slow weights.
        data: what the loss sees.
        kernels: the names of the custom kernels in the graph, if it was searched already.

    Raises:
        ProblemError: naming the kernel.
    """
    if _TRUSTED.get() or not fast:
        note("custom kernels", "their second derivatives were not checked (mf.trust)")
        return
    inputs, rebuild = pt.partition((slow, data), pt.is_differentiable)

    def loss(f: Params, xs: list[Tensor]) -> Tensor:
        return inner_loss(f, *rebuild(xs))

    loss = evaluated_for(hvp_reverse, replayed(loss, [*fast.values(), *inputs]))
    names = _search(loss, fast, inputs) if kernels is None else kernels
    if not names:
        return
    verdict = _compared(loss, fast, inputs)
    if verdict is None:
        note("custom kernels", "their second derivatives agree with a central difference")
        return
    raise ProblemError(
        f"{who} runs a kernel whose second derivative {verdict}: {', '.join(names)}. Use a "
        "composite of ordinary torch operators in its place, or an estimator of first derivatives "
        "(hvp=mf.hvp_finite(), mf.FirstOrder(), mf.Penalty)."
        + (" If you know that it is right: with mf.trust()." if "checked" in verdict else "")
    )


def _search(loss: Callable[..., Tensor], fast: Params, inputs: list[Tensor]) -> list[str]:
    with torch.enable_grad(), recompute.searched() as inside:
        leaves = [x.detach().requires_grad_() for x in (*fast.values(), *inputs)]
        point = dict(zip(fast, leaves, strict=False))
        value = loss(point, leaves[len(fast) :])
    return sorted({*foreign_nodes([value]), *inside})


def _compared(loss: Callable[..., Tensor], fast: Params, inputs: list[Tensor]) -> str | None:
    """Return what is wrong with the second derivative, or None."""
    dtypes = {x.dtype for x in (*fast.values(), *inputs)}
    if dtypes & {torch.float16, torch.bfloat16}:
        return "cannot be checked in half precision"
    generator = torch.Generator().manual_seed(0)
    along = {
        k: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        for k, x in fast.items()
    }
    with torch.no_grad():
        try:
            _, product = hvp_reverse(loss, fast, inputs)
            found = _flat(product(along))
        except (RuntimeError, NotImplementedError) as error:
            return f"does not exist ({error})"
        size = float(pt.norm(fast).clamp(min=1.0))
        # Two steps: where they disagree, kinks or random numbers make a difference useless.
        steps = [size * torch.finfo(min(dtypes, key=_eps)).eps ** (1 / p) for p in (3, 4)]
        first, second = (_flat(hvp_finite(h)(loss, fast, inputs)[1](along)) for h in steps)
    if _agree(found, second) or _agree(found, first):
        return None
    return "is lost" if _agree(first, second) else "cannot be checked by a central difference"


def _eps(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps


def _flat(product: tuple[Any, ...]) -> list[Tensor]:
    return [torch.view_as_real(x) if x.is_complex() else x for x in pt.tensors(product)]


def _agree(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return whether two products are near each other, in every tensor that matters."""
    whole = max(float(y.double().norm()) for y in b)
    return all(
        float((x.double() - y.double()).norm())
        <= TOLERANCE * max(float(y.double().norm()), TOLERANCE * whole)
        for x, y in zip(a, b, strict=True)
    )
