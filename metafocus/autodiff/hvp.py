"""Three ways to multiply with second derivatives, one signature (see `types.HVP`).

Each linearises once and can be used for many products.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.grad import leaf_alias, pulled_through, value_and_grad, vjp
from metafocus.autodiff.safe_operators.swapping import differentiable_once, differentiable_twice
from metafocus.checks import function, positive
from metafocus.errors import PrecisionWarning, ProblemError
from metafocus.rng import replayed
from metafocus.torch_internals import is_wrapper, tape_of_its_own, transforming, unwrap_dead
from metafocus.types import HVP, Params

Product = Callable[[Params], tuple[Any, ...]]


def hvp_reverse(loss: Callable[..., Tensor], fast: Params, *rest: Any) -> tuple[Params, Product]:
    """Linearise by reverse over reverse: one double backward a product, exact.

    Args:
        loss: `(fast, *rest) -> scalar`.
        fast: where the Hessian is taken.
        rest: further differentiable arguments, pytrees of floating-point tensors.

    Returns:
        The gradient by `fast`, and `product(d) = (H d, M_1' d, ...)`.

    Example:
        >>> x = {"x": torch.tensor([1.0, 2.0])}
        >>> g, product = hvp_reverse(lambda p: (p["x"] ** 3).sum(), x)
        >>> product({"x": torch.ones(2)})[0]["x"].detach()
        tensor([ 6., 12.])
    """
    track = torch.is_grad_enabled()
    if transforming() and (track or torch.compiler.is_compiling()):
        return vjp(torch.func.grad(loss), fast, *rest)
    inputs, rebuild = pt.partition((fast, *rest))
    with _tape(track) as leaf:
        leaves = [leaf(x) for x in inputs]
        value = loss(*rebuild(leaves))
        at = leaves[: len(fast)]
        grads = torch.autograd.grad(value, at, create_graph=True, materialize_grads=True)
    gradient = dict(zip(fast, grads, strict=True))
    product = TapeProduct(gradient, leaves, rebuild, track)
    return product.at_point(), product


@contextlib.contextmanager
def _tape(track: bool) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function that makes leaves of the tape that is recorded inside the block."""
    if transforming():
        with tape_of_its_own() as tape:
            yield tape.leaf
        return
    with torch.enable_grad():
        yield lambda x: leaf_alias(x, track)


@dataclass(frozen=True)
class TapeProduct:
    """Products with the second derivatives of one graph: all of them, or only those asked for.

    Attributes:
        gradient: the gradient by the fast weights, with its graph.
        leaves: what the graph begins at: the fast weights, then the rest.
        rebuild: puts tensors in the place of the leaves together.
        track: whether the products can be differentiated again.
    """

    gradient: Params
    leaves: list[Tensor]
    rebuild: Callable[[Any], Any]
    track: bool

    def at_point(self) -> Params:
        """Return the gradient where it was linearised."""
        plain = dict(zip(self.gradient, unwrap_dead(self.gradient.values()), strict=True))
        return plain if self.track else pt.detach(plain)

    def __call__(self, direction: Params) -> tuple[Any, ...]:
        """Return the whole product."""
        return self.rebuild(self._along(direction, self.leaves))

    def hessian(self, direction: Params) -> Params:
        """Return the first entry of the product only."""
        found = self._along(direction, self.leaves[: len(self.gradient)])
        return dict(zip(self.gradient, found, strict=True))

    def mixed(self, direction: Params) -> tuple[Any, ...]:
        """Return the entries of the product after the first."""
        count = len(self.gradient)
        found = self._along(direction, self.leaves[count:])
        return self.rebuild([*self.leaves[:count], *found])[1:]

    def _along(self, direction: Params, leaves: list[Tensor]) -> Sequence[Tensor]:
        return unwrap_dead(pulled_through(self.gradient, direction, leaves, track=self.track))


def hvp_forward(loss: Callable[..., Tensor], fast: Params, *rest: Any) -> tuple[Params, Product]:
    """Linearise by forward over reverse: one `jvp` of the gradient a product, exact.

    Mixed partial derivatives commute, so the tangent of the gradient by *all* arguments along a
    direction of `fast` is the Hessian product together with the mixed products
    (MixFlow-MG, arXiv 2505.00793).

    Args:
        loss: `(fast, *rest) -> scalar`.
        fast: where the Hessian is taken.
        rest: further differentiable arguments, pytrees of floating-point tensors.

    Returns:
        As `hvp_reverse`.

    Example:
        >>> x = {"x": torch.tensor([1.0, 2.0])}
        >>> g, product = hvp_forward(lambda p: (p["x"] ** 3).sum(), x)
        >>> product({"x": torch.ones(2)})[0]["x"]
        tensor([ 6., 12.])
    """
    _refuse_sharded("hvp_forward", fast)
    # Forward mode refuses an expanded tensor, whose elements lie in one place.
    fast = {name: x.contiguous() for name, x in fast.items()}
    loss = replayed(loss, pt.tensors((fast, rest)))

    def gradient(f: Params) -> tuple[Any, ...]:
        return torch.func.grad(loss, argnums=tuple(range(1 + len(rest))))(f, *rest)

    def product(direction: Params) -> tuple[Any, ...]:
        return torch.func.jvp(gradient, (fast,), (direction,))[1]

    return torch.func.grad(loss)(fast, *rest), product


@dataclass(frozen=True)
class _Finite:
    eps: float | None

    first_order = True

    def __call__(
        self, loss: Callable[..., Tensor], fast: Params, *rest: Any
    ) -> tuple[Params, Product]:
        _refuse_sharded("hvp_finite", fast)
        loss = replayed(loss, pt.tensors((fast, rest)))
        # A half type holds too few digits for the difference of two gradients.
        (point, *others), like = _wide(loss, fast, *rest)

        def product(direction: Params) -> tuple[Any, ...]:
            direction = {k: v.to(point[k].dtype) for k, v in direction.items()}
            # With a largest entry of 1: the squares of a small or large direction leave the range.
            size = _unit(direction)
            direction = {k: v / size for k, v in direction.items()}
            # The step is a constant: also for second derivatives, and where a norm is zero.
            step = self._step(pt.detach(point), pt.detach(direction))
            ahead, behind = (
                pt.partition(_gradient(loss, pt.add(point, direction, s), *others))
                for s in (step, -step)
            )
            slopes = [(a - b) / (2 * step) * size for a, b in zip(ahead[0], behind[0], strict=True)]
            return ahead[1]([x.to(y.dtype) for x, y in zip(slopes, like, strict=True)])

        return _gradient(lambda f: loss(f, *rest), fast)[0], product

    def _step(self, fast: Params, direction: Params) -> Tensor:
        length = pt.norm(direction)
        length = torch.where(length > 0, length, torch.ones_like(length))
        if self.eps is not None:
            return self.eps / length
        size = pt.norm(fast)
        eps = torch.finfo(size.dtype).eps ** (1 / 3)
        return eps * torch.clamp(size, min=1.0) / length


def _wide(loss: Callable[..., Tensor], *primals: Any) -> tuple[list[Any], list[Tensor]]:
    """Return arguments of a loss in float32 or wider, if it runs on them, and all their tensors."""
    tensors, rebuild = pt.partition(primals)
    half = {str(x.dtype) for x in pt.tensors(primals[0]) if _is_half(x)}
    if not half:
        return list(primals), tensors
    wide = rebuild([x.float() if _is_half(x) else x for x in tensors])
    try:
        with torch.no_grad():
            loss(*wide)
    except RuntimeError:
        warnings.warn(
            f"hvp_finite: the fast weights are {', '.join(sorted(half))}, and the loss does not "
            "run on float32 copies of its arguments, because it holds tensors of a half type of "
            "its own. The difference of two gradients keeps few digits of a half type: products "
            "are off by 2 % to 60 %. Pass these tensors in outer or in the episode, keep the fast "
            "weights in float32, or use hvp_reverse.",
            PrecisionWarning,
            stacklevel=2,
        )
        return list(primals), tensors
    return list(wide), tensors


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def _unit(direction: Params) -> Tensor:
    """Return the largest absolute entry, detached, or 1 where all are zero."""
    entries = [v.detach().abs().amax() for v in direction.values() if v.numel()]
    size = torch.stack(entries).amax() if entries else torch.zeros(())
    return size + size.logical_not()


def _gradient(loss: Callable[..., Tensor], *primals: Any) -> tuple[Any, ...]:
    # On the tape, a gradient that is not differentiated needs no graph.
    inputs, rebuild = pt.partition(primals)
    point = {str(i): x for i, x in enumerate(inputs)}
    _, grads = value_and_grad(
        lambda p: loss(*rebuild(list(p.values()))), point, differentiable=True
    )
    return rebuild(list(grads.values()))


def _refuse_sharded(who: str, fast: Params) -> None:
    for name, x in fast.items():
        if is_wrapper(x):
            raise ProblemError(
                f"the fast weight {name!r} is a {type(x).__name__}, and {who} mixes it with whole "
                "tensors, which torch refuses. Use hvp=mf.hvp_reverse, or fast weights that each "
                "process holds whole."
            )


def evaluated_for(hvp: HVP, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss with the composites that this way of multiplying needs.

    A way with an attribute `first_order = True` asks for first derivatives only and keeps the
    fused kernels.
    """
    return differentiable_twice(loss) if differentiates_twice(hvp) else differentiable_once(loss)


def differentiates_twice(hvp: HVP) -> bool:
    """Return whether a way of multiplying asks a loss for its second derivatives."""
    return not getattr(hvp, "first_order", False)


def hvp_finite(eps: float | None = None) -> HVP:
    """Return central differences of first derivatives: no double backward is ever asked for.

    `product(d) = (g(fast + h d) - g(fast - h d)) / (2 h)` for the gradient `g` by all arguments.
    The error is `O(h^2)` from the third derivative plus `O(u / h)` from rounding, with `u` the
    unit round-off.

    A difference of values sees through `detach()`: where the loss detaches something that depends
    on the fast weights, such as the losses that Meta-Weight-Net weighs, the product is another one
    than on the tape. Use `hvp_reverse` or `hvp_forward` for such a loss; `mf.compare` shows it.

    Arguments of a half type are evaluated as float32 copies. A loss that does not run on these
    gets a `PrecisionWarning`. A loss that casts to a half type itself is not found out: its
    products are off by 2 % to 60 %.

    Args:
        eps: length of the displacement `h |d|`, absolute (DARTS, arXiv 1806.09055, uses
            0.01). None: `u^(1/3) max(|fast|, 1)`, relative to the fast weights.

    Raises:
        ValueError: if `eps` is not positive and finite.

    Example:
        >>> x = {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)}
        >>> g, product = hvp_finite()(lambda p: (p["x"] ** 2).sum(), x)
        >>> product({"x": torch.ones(2)})[0]["x"].detach().round(decimals=6)
        tensor([2., 2.], dtype=torch.float64)
    """
    if eps is not None:
        positive("eps", eps)
    return _Finite(eps)


def check_hvp(hvp: Any) -> None:
    """Raise unless a way to multiply with second derivatives is one."""
    form = "(loss, fast, *rest), such as mf.hvp_reverse, mf.hvp_forward or mf.hvp_finite()"
    function("hvp", hvp, form, 2)
