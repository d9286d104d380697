"""Counts of what an estimator asks of an inner loss: evaluations and second-order products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.problem import Problem
from metafocus.types import MatVec, Params


class Tally:
    """Counts evaluations of the inner loss and products with its second derivatives.

    Attributes:
        losses: evaluations of the inner loss.
        products: how often a gradient of it was differentiated, in either mode.
        solves: products that a linear solver asked for.
        residual: `|A x - b| / |b|` of the last linear system.
    """

    def __init__(self) -> None:
        self.residual: float | None = None
        self.reset()

    def reset(self) -> None:
        """Start to count anew."""
        self.losses = self.products = self.solves = 0

    def counting(self, problem: Problem) -> Problem:
        """Return the problem with an inner loss that is counted."""

        def inner_loss(fast: Params, slow: Params, data: Any) -> Tensor:
            self.losses += 1
            seen = _Seen.apply(self, *fast.values()) if fast else ()
            return problem.inner_loss(dict(zip(fast, seen, strict=True)), slow, data)

        return dataclasses.replace(problem, inner_loss=inner_loss)

    def watching(self, solve: Callable[[MatVec, Params], Params]) -> Any:
        """Return the linear solver, watched: its products and its residual."""

        def watched(matvec: MatVec, b: Params) -> Params:
            def counted(v: Params) -> Params:
                self.solves += 1
                return matvec(v)

            x = solve(counted, b)
            products = self.products
            self.residual = float(pt.norm(pt.sub(matvec(x), b)) / pt.norm(b))
            # The residual is the instrument's own product.
            self.products = products
            return x

        return watched


class _Seen(torch.autograd.Function):
    """The fast weights themselves; their gradient passes through `_Differentiated`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tally: Tally, *fast: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in fast)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tally = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_Differentiated.apply(ctx.tally, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tuple(t.view_as(t) for t in tangents[1:])


class _Differentiated(torch.autograd.Function):
    """The gradient itself; each time it is differentiated is a product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tally: Tally, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tally = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        ctx.tally.products += 1
        return None, *cotangents

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        ctx.tally.products += 1
        return tuple(t.view_as(t) for t in tangents[1:])
