"""Activation checkpointing that every function transform can see through.

`torch.utils.checkpoint` uses saved-tensor hooks, which `torch.func.grad` refuses. This is a
custom Function instead: it saves only its inputs, all of them explicit tensors, and rebuilds the
graph when a derivative is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff import grad as derivatives
from metafocus.autodiff.safe_operators import swapping
from metafocus.autodiff.tape import foreign_nodes
from metafocus.calls import Call, Scoped, attempt, current
from metafocus.rng import Drawn
from metafocus.torch_internals import (
    pytree,
    refuse_nested_forward_mode,
    unwrap_dead,
)

Pullback = Callable[[tuple[Any, ...], Any], tuple[Any, ...]]

_FOUND: Scoped[set[str] | None] = Scoped(None)


@contextlib.contextmanager
def searched() -> Iterator[set[str]]:
    """Collect the names of custom kernels inside recomputed functions, in a `with` block."""
    names: set[str] = set()
    with _FOUND.set(names):
        yield names


class Ambient:
    """What the forward pass ran in: to run the same code again in the same surroundings."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.call: Call | None = current()
        self.swapped: swapping.Swapped | None = swapping.active()
        kinds = {"cpu", *(x.device.type for x in tensors)}
        self.autocast: list[tuple[str, torch.dtype, bool]] = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        ]

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Run code for the first time inside a `with` block."""
        # The weight cache of autocast would hand a cast made without a graph to a later forward
        # pass that needs one.
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self.autocast:
                # Also where it was off: the backward pass may run inside an autocast block.
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield

    @contextlib.contextmanager
    def again(self, drawn: Drawn) -> Iterator[None]:
        """Run code again inside a `with` block."""
        swapped = contextlib.nullcontext() if self.swapped is None else self.swapped
        with attempt(call=self.call), drawn.again(), self.first(), swapped:
            yield


class _Spec:
    """What does not need a derivative: the function, and how its arguments are put together."""

    def __init__(
        self,
        fn: Callable[..., Any],
        rebuild: Callable[[Any], tuple[Any, ...]],
        inputs: Sequence[Tensor],
        pullback: Pullback | None,
    ):
        self.fn = fn
        self.rebuild = rebuild
        self.pullback = pullback
        compiling = torch.compiler.is_compiling()
        self.ambient = None if compiling else Ambient(inputs)
        self.drawn = None if compiling else Drawn.shared(inputs)
        self.whole: Callable[[Any], Any] | None = None

    def first(self) -> contextlib.AbstractContextManager[None]:
        # A compiler traces through the surroundings by itself.
        return contextlib.nullcontext() if self.ambient is None else self.ambient.first()

    def again(self) -> contextlib.AbstractContextManager[None]:
        if self.ambient is None or self.drawn is None:
            return contextlib.nullcontext()
        return self.ambient.again(self.drawn)

    def flat(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, self.whole = pt.partition(self.fn(*self.rebuild(inputs)))
        # Returning an input as it is would make it an output of the custom Function.
        given = {id(x) for x in inputs}
        return tuple(y.clone() if id(y) in given else y for y in outputs)

    def grads(
        self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        with self.again():
            if self.pullback is None:
                return derivatives.pullback(self.flat, inputs, cotangents, wanted)
            assert self.whole is not None
            args = self.rebuild(inputs)
            grads = self.pullback(args, self.whole(cotangents))
            return [g if w else None for g, w in zip(_aligned(grads, args), wanted, strict=True)]


def _aligned(grads: tuple[Any, ...], args: tuple[Any, ...]) -> list[Tensor | None]:
    """Return one gradient for each tensor leaf of `args`; a None subtree means no gradient."""
    leaves: list[Tensor | None] = []
    for grad, arg in zip(grads, args, strict=True):
        if grad is None:
            leaves += [None] * len(pt.tensors(arg))
        else:
            chosen = [isinstance(x, Tensor) for x in pytree.tree_leaves(arg)]
            flat = pytree.tree_leaves(grad)
            leaves += [g for g, c in zip(flat, chosen, strict=True) if c]
    return leaves


class _Recompute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(spec: _Spec, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = None if torch.compiler.is_compiling() else _FOUND.get()
        with spec.first():
            if found is None:
                return spec.flat(*inputs)
            with torch.enable_grad():
                outputs = spec.flat(
                    *(x.detach().requires_grad_(pt.is_differentiable(x)) for x in inputs)
                )
            found.update(foreign_nodes(outputs))
            return tuple(x.detach() for x in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.spec = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs = unwrap_dead(ctx.saved_tensors)
        return None, *ctx.spec.grads(inputs, cotangents, ctx.needs_input_grad[1:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        spec, inputs, tangents = ctx.spec, unwrap_dead(ctx.saved_tensors), tangents[1:]
        chosen = [i for i, t in enumerate(tangents) if t is not None]
        at = [inputs[i] for i in chosen]

        kept: list[bool] = []

        def fn(*xs: Tensor) -> tuple[Tensor, ...]:
            merged = list(inputs)
            for i, x in zip(chosen, xs, strict=True):
                merged[i] = x
            outputs = spec.flat(*merged)
            kept[:] = [pt.is_differentiable(y) for y in outputs]
            return tuple(y for y in outputs if pt.is_differentiable(y))

        with spec.again():
            _, push = derivatives.pushforward(fn, *at)
            found = iter(push(*(tangents[i] for i in chosen)))
        return tuple(next(found) if keep else None for keep in kept)


def recompute(fn: Callable[..., Any], *args: Any, pullback: Pullback | None = None) -> Any:
    """Return `fn(*args)`, and keep only `args` for the derivatives.

    The value is computed without a graph; each derivative runs `fn` again, with the random state,
    the autocast state and the swapped operators of the first time. Exact under `backward`,
    `torch.func.grad`, `vmap`, `jvp` and their compositions, except forward mode inside forward
    mode, which is refused.

    Args:
        fn: a function of pytrees of tensors that returns a pytree of tensors; leaves that are
            no tensors come back as they were the first time. Every tensor that
            needs a derivative, and every tensor batched by `vmap`, must be in `args`.
        args: pytrees; leaves that are not tensors are passed as they are.
        pullback: `(args, cotangents) -> gradients`, trees like `args` with None where there is
            none, to be used instead of differentiating `fn`; a cotangent may be None.

    Raises:
        TransformError: under two nested forward-mode transforms.

    Example:
        >>> x = torch.tensor(2.0)
        >>> torch.func.grad(lambda x: recompute(lambda y: y**3, x))(x)
        tensor(12.)
    """
    refuse_nested_forward_mode("recompute")
    inputs, rebuild = pt.partition(args)
    spec = _Spec(fn, rebuild, inputs, pullback)
    outputs = _Recompute.apply(spec, *inputs)
    assert spec.whole is not None
    return spec.whole(outputs)
