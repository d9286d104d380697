"""A solution reached without a graph, with a derivative attached: what many estimators share."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.grad import value_and_grad
from metafocus.calls import Call, attempt, current
from metafocus.errors import NotStationaryWarning, ProblemError, TransformError
from metafocus.solvers.descent import solve_inner
from metafocus.streams import is_stream
from metafocus.torch_internals import transforming, unwrap_dead
from metafocus.types import InnerLoss, Params, Solution, Solver

STATIONARY = 1e-2
"""The inner gradient must have fallen to this fraction of its initial norm."""


class Point(NamedTuple):
    """Where the derivative is taken: the solution and what it depends on."""

    fast: Params
    outer: Params
    support: Any

    def floats(self, wanted: Iterable[bool] | None = None) -> tuple[list[Tensor], Any]:
        """Return the differentiable leaves of `(outer, support)`, and their way back.

        `wanted` says for each tensor of `(outer, support)` whether to take it; None: all.
        """
        flags = itertools.repeat(True) if wanted is None else iter(wanted)
        return pt.partition(
            (self.outer, self.support), lambda x: next(flags) and pt.is_differentiable(x)
        )


class Inner(NamedTuple):
    """What an estimator is called with.

    Attributes:
        loss: what the inner solver goes down, step by step.
        solver: the inner optimiser.
        start: the fast weights before the first step.
        outer: the slow weights.
        support: what the inner loss sees, or a stream of it.
    """

    loss: InnerLoss
    solver: Solver
    start: Params
    outer: Params
    support: Any


class System:
    """The inner problem as an estimator sees it: how to solve it and how the solution moves.

    Subclasses give `pull`, the vector-Jacobian product of the solution with respect to the
    differentiable leaves of `(outer, support)`, and `push`, the Jacobian-vector product.

    Args:
        inner: what the estimator is called with.
        data: if the support is a stream, a function from it to the data that the derivative is
            taken on.

    Attributes:
        at_solution: the inner loss that the derivative is taken of.
        defers: whether `pull` finds out on its way how stationary the solution is. Then
            `inspect` is left out where `pull` is sure to be able to look: on the plain tape.
        on_tape: whether derivatives, if any, are those of the plain tape.
    """

    defers = False

    def __init__(self, inner: Inner, data: Callable[[Any], Any] | None = None):
        inner_loss, solver, start, outer, support = inner
        self.inner_loss = inner_loss
        self.at_solution: InnerLoss = inner_loss
        if data is not None and is_stream(support):
            self.at_solution = lambda fast, slow, stream: inner_loss(fast, slow, data(stream))
        self.solver = solver
        self.call: Call | None = current()
        self.names: tuple[str, ...] = tuple(start)
        self.inputs: list[Tensor]
        self.rebuild: Callable[[Any], Any]
        self.inputs, self.rebuild = pt.partition((pt.detach(start), outer, support))
        self.on_tape: bool = (
            torch.is_grad_enabled()
            and not transforming()
            and any(x.requires_grad for x in self.inputs)
        )

    def pull(self, point: Point, right: Params, wanted: Sequence[bool]) -> list[Tensor]:
        """Return the derivative of `<right, fast>` by each of `point.floats(wanted)`."""
        raise NotImplementedError

    def push(self, point: Point, along: list[Tensor]) -> Params:
        """Return the derivative of the fast weights along a direction of `point.floats()`."""
        raise NotImplementedError

    def inspect(self, start: Params, point: Point) -> None:
        """Look at the solution outside transforms, to warn."""

    def solution(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Solve the inner problem from flat inputs; return flat fast weights and the losses."""
        start, outer, support = pt.detach(self.rebuild(inputs))
        fast, losses, _ = solve_inner(self.inner_loss, self.solver, start, outer, support)
        if not transforming() and not (self.defers and self.on_tape):
            self.inspect(start, Point(fast, outer, support))
        # Without a step the solution is the start, and an input may not be an output.
        values = [fast[k].clone() if fast[k] is start[k] else fast[k] for k in self.names]
        return *values, losses

    def point(self, saved: Sequence[Tensor]) -> Point:
        """Return the point from the flat inputs and the flat solution."""
        _, outer, support = self.rebuild(saved[: len(self.inputs)])
        fast = dict(zip(self.names, saved[len(self.inputs) :], strict=True))
        return Point(fast, outer, support)


def attach(system: System) -> Solution:
    """Return the inner solution whose derivatives are those of the system."""
    *fast, losses = _Attached.apply(system, *system.inputs)
    return Solution(dict(zip(system.names, fast, strict=True)), losses.detach())


class _Attached(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(system: System, *inputs: Tensor) -> tuple[Tensor, ...]:
        return system.solution(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.system = inputs[0]
        ctx.set_materialize_grads(False)
        # The solution is an output and saved as one: that makes second derivatives right.
        saved = (*inputs[1:], *output[:-1])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.like_losses = (output[-1].shape, output[-1].dtype, output[-1].device)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        system, saved = ctx.system, unwrap_dead(ctx.saved_tensors)
        if not torch.is_grad_enabled():
            saved = [x.detach() for x in saved]
        point = system.point(saved)
        right = {
            k: torch.zeros_like(x) if v is None else v
            for (k, x), v in zip(point.fast.items(), cotangents, strict=False)
        }
        count = len(system.names)
        rest = saved[count : len(system.inputs)]
        wanted = ctx.needs_input_grad[1 + count :]
        with attempt(call=system.call):
            found = iter(system.pull(point, right, wanted))
        grads = [
            next(found) if w and pt.is_differentiable(x) else None
            for x, w in zip(rest, wanted, strict=True)
        ]
        return None, *[None] * count, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        system, saved = ctx.system, unwrap_dead(ctx.saved_tensors)
        # Not system.inputs: under a transform these belong to a level that is gone.
        inputs = saved[: len(system.inputs)]
        pairs = list(zip(inputs, tangents[1:], strict=True))[len(system.names) :]
        along = [
            torch.zeros_like(x) if t is None else t for x, t in pairs if pt.is_differentiable(x)
        ]
        moved = system.push(system.point(saved), along)
        shape, dtype, device = ctx.like_losses
        losses = torch.zeros(shape, dtype=dtype, device=device)
        return *(moved[k] for k in system.names), losses


def once(name: str, grads: Sequence[Tensor], reasons: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients; deriving them by the `reasons` raises instead of giving zero."""
    return list(_Once.apply(name, len(grads), *grads, *reasons)) if grads else []


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[:size])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise first_only(ctx.name)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise first_only(ctx.name)


def first_only(name: str) -> TransformError:
    """Return the error of an estimator that has no second derivative and no forward mode."""
    return TransformError(
        f"{name} gives first derivatives by reverse mode only; a second derivative or forward "
        "mode needs Implicit, FixedPoint or Unrolled."
    )


def need_data(name: str, support: Any, data: Any) -> None:
    """Raise if the support is a stream and nothing says which of its data to differentiate on."""
    if is_stream(support) and data is None:
        raise ProblemError(
            f"{name} differentiates the solution and needs one support; the support is a stream "
            f"({type(support).__name__}). Pass data=, a function from the stream to the data that "
            "the derivative is taken on, such as data=lambda stream: stream.at(0), or use "
            "Unrolled."
        )


def gradient_norm(inner_loss: InnerLoss, point: Point) -> Tensor:
    """Return the norm of the inner gradient at a point: how stationary it is."""
    _, grads = value_and_grad(
        lambda p: inner_loss(p, point.outer, point.support),
        point.fast,
        differentiable=False,
    )
    return pt.norm(grads)


def warn_if_large(
    name: str, what: str, before: Callable[[], Tensor], after: Tensor, remedy: str
) -> None:
    """Warn if a residual has not fallen to `STATIONARY` of what it was; a host synchronisation.

    `before` is asked for only if `after` is not small by itself.
    """
    # Below the square root of the rounding unit a ratio of two residuals compares noise. An
    # infinite residual comes with an infinite loss, which raises NonFiniteError.
    value = float(after)
    if not torch.finfo(after.dtype).eps ** 0.5 < value < float("inf"):
        return
    initial = float(before())
    if value > STATIONARY * initial:
        warnings.warn(
            f"{name}: the {what} is {value:.3g} at the solution, {value / initial:.2g} of its "
            f"initial {initial:.3g}; above {STATIONARY} the estimate is biased. {remedy}",
            NotStationaryWarning,
            stacklevel=2,
        )
