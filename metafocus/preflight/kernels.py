"""Kernels without a second derivative: found in the graph of a loss and judged by one product.

The backward pass of a custom Function may return values without a graph, as Triton and CUDA
kernels do. A second derivative through it is then lost without an error. The graph of the loss is
searched for nodes that are not ATen's own. Only if there are any, one product with the second
derivative is compared with a central difference of the gradient. A loss that takes a gradient
through such nodes itself loses a first derivative: that is compared with a difference of the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff import recompute
from metafocus.autodiff.hvp import evaluated_for, hvp_finite, hvp_reverse
from metafocus.autodiff.tape import foreign_nodes
from metafocus.calls import Scoped, note
from metafocus.errors import ProblemError
from metafocus.preflight.own_gradients import OwnGradients
from metafocus.rng import replayed
from metafocus.types import InnerLoss, Params

UNDECIDED = 0.05
"""Largest relative error of a product that is accepted where the central differences disagree as
much with each other."""

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

    def derivative(point: Params, along: Params) -> list[Tensor]:
        return _flat(hvp_reverse(loss, point, inputs)[1](along))

    def difference(point: Params, along: Params, step: float) -> list[Tensor]:
        return _flat(hvp_finite(step)(loss, point, inputs)[1](along))

    verdict = _compared(fast, inputs, derivative, difference)
    if verdict is None:
        note("custom kernels", "their second derivatives agree with a central difference")
        return
    raise ProblemError(
        f"{who} runs a kernel whose second derivative {verdict}: {', '.join(names)}. Use a "
        "composite of ordinary torch operators in its place, or an estimator of first derivatives "
        f"(hvp=mf.hvp_finite(), mf.FirstOrder(), mf.Penalty).{_way_out(verdict)}"
    )


def refuse_lost_first_derivatives(
    who: str, loss: InnerLoss, fast: Params, slow: Params, data: Any, own: OwnGradients
) -> None:
    """Raise if a first derivative of a loss that differentiates kernels itself is lost in them.

    Args:
        who: the name of the loss.
        loss: `(fast, slow, data) -> scalar`.
        fast: constants, as all arguments.
        slow: the slow weights.
        data: what the loss sees.
        own: what it differentiates.

    Raises:
        ProblemError: naming the kernels.
    """
    if _TRUSTED.get() or not own.kernels:
        return
    moving = slow if own.detaches else (slow, data)
    inputs, rebuild = pt.partition(moving, pt.is_differentiable)
    given = dict(zip(map(str, range(len(inputs))), inputs, strict=True))
    sideways = _random(given, torch.Generator().manual_seed(1))
    again = replayed(loss, pt.tensors((fast, slow, data)))

    def value(point: Params, along: Params, ahead: Any, aside: Any) -> Tensor:
        moved = rebuild([*pt.add(given, sideways, aside).values()])
        rest = (moved, data) if own.detaches else moved
        return again(pt.add(point, along, ahead), *rest)

    def derivative(point: Params, along: Params) -> list[Tensor]:
        with torch.enable_grad():
            far = [torch.zeros((), requires_grad=True) for _ in range(2)]
            found = torch.autograd.grad(value(point, along, *far), far, materialize_grads=True)
        return list(found)

    def difference(point: Params, along: Params, step: float) -> list[Tensor]:
        ways = [(step, 0.0), (0.0, step)]
        with torch.enable_grad():  # The loss differentiates.
            pairs = [[value(point, along, s * x, s * y) for s in (1, -1)] for x, y in ways]
        return [(ahead - behind).detach() / (2 * step) for ahead, behind in pairs]

    verdict = _compared(fast, inputs, derivative, difference)
    if verdict is not None:
        raise ProblemError(
            f"{who} takes a gradient through a kernel, and its own derivative, which needs the "
            f"kernel's second one, {verdict}: {', '.join(sorted(own.kernels))}. Use a composite of "
            f"ordinary torch operators in its place.{_way_out(verdict)}"
        )


def _way_out(verdict: str) -> str:
    return " If you know that it is right: with mf.trust()." if "checked" in verdict else ""


def _search(loss: Callable[..., Tensor], fast: Params, inputs: list[Tensor]) -> list[str]:
    with torch.enable_grad(), recompute.searched() as inside:
        leaves = [x.detach().requires_grad_() for x in (*fast.values(), *inputs)]
        point = dict(zip(fast, leaves, strict=False))
        value = loss(point, leaves[len(fast) :])
    return sorted({*foreign_nodes([value]), *inside})


def _compared(
    fast: Params,
    inputs: list[Tensor],
    derivative: Callable[[Params, Params], list[Tensor]],
    difference: Callable[[Params, Params, float], list[Tensor]],
) -> str | None:
    """Return what is wrong with a derivative along a direction, or None."""
    dtypes = {x.dtype for x in (*fast.values(), *inputs)}
    if dtypes & {torch.float16, torch.bfloat16}:
        return "cannot be checked in half precision"
    generator = torch.Generator().manual_seed(0)
    along, moved = _random(fast, generator), pt.add(fast, _sizes(fast, _random(fast, generator)))
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    with torch.no_grad():
        for point in (moved, fast):
            size = float(pt.norm(point).clamp(min=1.0))
            steps = [size * eps ** (1 / p) for p in (2, 3, 4)]
            try:
                found = derivative(point, along)
                slopes = [difference(point, along, step) for step in steps]
            except (RuntimeError, NotImplementedError) as error:
                return f"does not exist ({error})"
            # The loss may be defined near the start only.
            if all(bool(x.isfinite().all()) for slope in slopes for x in slope):
                # Kinks ask for small steps, and rounding for large ones. Where no two steps agree,
                # both make a difference useless, or random numbers do.
                pair = min(pairwise(slopes), key=lambda ab: _part(*ab))
                return _verdict(found, *pair, eps ** (1 / 4))
    return "cannot be checked by a central difference"


def _random(fast: Params, generator: torch.Generator) -> Params:
    draw = {"generator": generator, "dtype": torch.float64}
    return {k: torch.randn(x.shape, **draw).to(x) for k, x in fast.items()}


def _sizes(fast: Params, noise: Params) -> Params:
    """Return a move by a tenth of every entry, and from zeros by 0.1.

    At the start itself the lost terms may all be zero, as those of x**3 are at 0.
    """
    return {k: 0.1 * noise[k] * torch.where(x == 0, 1.0, x.abs()) for k, x in fast.items()}


def _flat(product: tuple[Any, ...]) -> list[Tensor]:
    return [torch.view_as_real(x) if x.is_complex() else x for x in pt.tensors(product)]


def _verdict(
    found: list[Tensor], near: list[Tensor], far: list[Tensor], tolerance: float
) -> str | None:
    """Return what is wrong with a product, judged by two central differences, or None.

    A lost term is seen if the differences agree ten times better with each other than with the
    product: their own errors grow with the step, or shrink with it, and so part them.
    """
    whole = max(_distance(y) for y in far)
    doubtful = False
    for x, a, b in zip(found, near, far, strict=True):
        error, noise, size = min(_distance(x, a), _distance(x, b)), _distance(a, b), _distance(b)
        if error <= tolerance * max(size, tolerance * whole):
            continue
        if not error <= 10 * noise:
            return "is lost"
        doubtful = doubtful or not error <= UNDECIDED * max(size, UNDECIDED * whole)
    return "cannot be checked by a central difference" if doubtful else None


def _part(near: list[Tensor], far: list[Tensor]) -> float:
    """Return how far two differences are apart, relative to the whole."""
    return max(map(_distance, near, far)) / max(1e-300, *map(_distance, far))


def _distance(x: Tensor, y: Tensor | None = None) -> float:
    return float((x.double() if y is None else x.double() - y.double()).norm())
