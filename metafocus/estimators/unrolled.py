"""Differentiate through the inner steps: all, the last few, or none of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus import tree
from metafocus.autodiff.backends import pullback
from metafocus.autodiff.hvp import evaluated_for, hvp_reverse
from metafocus.autodiff.recompute import recompute
from metafocus.problem import Problem
from metafocus.solvers.descent import count, descend, segment, stacked
from metafocus.types import HVP, InnerLoss, Params, Solution, Solver, State


@dataclass(frozen=True)
class Unrolled:
    """Differentiate through the inner loop, as if it were any other code.

    `d fast_K / d outer = sum_t (prod_(s>t) d fast_(s+1) / d fast_s) d fast_(t+1) / d outer`.

    With `last=k` only the last `k` steps are differentiated; the steps before are constant, and
    the fast weights after them are tied straight-through to `init(outer)`: with identity `init`,
    `last=0` is first-order MAML. (Truncated back-propagation: Shaban et al., arXiv 1810.10667.)

    Args:
        last: how many steps to differentiate, from the end; None: all.
        recompute: False keeps the graph of all steps. True or `k` runs the inner loop without a
            graph and rebuilds it in the backward pass, one step or `k` steps at a time: memory
            flat in `steps` (under `backward` and `hypergrad`; `torch.func.grad` records its own
            backward pass), for 1.2 to 1.5 times the time. Of segments of `k > 1` the last keeps
            its graph, as it is needed first; if `k` does not divide the steps, the first is the
            shorter one. Same gradient.
        hvp: how to multiply with second derivatives: `hvp_reverse` (exact), `hvp_forward`
            (exact, MixFlow-MG, arXiv 2505.00793) or `hvp_finite(eps)`, which needs first
            derivatives only. The last two rebuild step by step.

    Raises:
        ValueError: for a negative `last` or `recompute`.

    Example:
        >>> Unrolled(last=3, recompute=True)
        Unrolled(last=3, recompute=True, hvp=hvp_reverse)
    """

    last: int | None = None
    recompute: bool | int = False
    hvp: HVP = hvp_reverse

    def __post_init__(self) -> None:
        for name, value in (("last", self.last), ("recompute", self.recompute)):
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}.")
        if isinstance(self.last, bool):
            raise ValueError(f"last must be an integer >= 0, got {self.last!r}.")

    def __repr__(self) -> str:
        hvp = getattr(self.hvp, "__name__", self.hvp)
        return f"Unrolled(last={self.last}, recompute={self.recompute}, hvp={hvp})"

    @property
    def explicit(self) -> bool:
        """Whether derivatives flow through explicit tensors only."""
        return self.last != 0 and (bool(self.recompute) or self.hvp is not hvp_reverse)

    def __call__(self, problem: Problem, solver: Solver, outer: Params, support: Any) -> Solution:
        """Run the inner loop."""
        start = problem.start(outer)
        steps = count(solver, start)
        head = 0 if self.last is None else max(steps - self.last, 0)
        params, state, losses = start, solver.init(start), []
        if head:
            params, state, losses = descend(
                problem.inner_loss,
                solver,
                tree.detach(start),
                tree.detach(state),
                tree.detach(outer),
                tree.detach(support),
                range(head),
                differentiable=False,
            )
            params = {k: v + (start[k] - start[k].detach()) for k, v in params.items()}
        if head < steps:
            loss = evaluated_for(self.hvp, problem.inner_loss)
            tail = self._rebuilt if self.explicit else segment
            run = tail(loss, solver, range(head, steps))
            params, state, more = run(params, state, outer, support)
            losses = losses + more
        return Solution(params, stacked(losses, params))

    def _rebuilt(self, loss: InnerLoss, solver: Solver, steps: range) -> Callable[..., Any]:
        """Return what `segment` returns, but rebuilt in the backward pass."""
        exact = self.hvp is hvp_reverse
        size = int(self.recompute) if exact else 1

        def run(params: Params, state: State, outer: Params, support: Any) -> Any:
            losses: list[Tensor] = []
            for part in _segments(steps, size):
                forward = segment(loss, solver, part)
                if size > 1 and part.stop == steps.stop:
                    # The backward pass begins here: it would rebuild this graph before any other.
                    params, state, more = forward(params, state, outer, support)
                else:
                    pull = None if exact else _step_pullback(loss, solver, part.start, self.hvp)
                    params, state, more = recompute(
                        forward, params, state, outer, support, pullback=pull
                    )
                    more = [x.detach() for x in more]
                losses += more
            return params, state, losses

        return run


def _segments(steps: range, size: int) -> list[range]:
    """Return the steps in pieces of `size`; a shorter one comes first, as it is rebuilt."""
    ends = list(range(steps.stop, steps.start, -size))[::-1]
    return [range(max(end - size, steps.start), end) for end in ends]


def FirstOrder() -> Unrolled:
    """Return `Unrolled(last=0)`: the adapted fast weights move with `init(outer)` only.

    `d outer_loss / d outer = direct + v' d init / d outer`, with `v` the derivative of the outer
    loss by the fast weights: the adaptation counts as a constant shift. First-order MAML (arXiv
    1703.03400, section 5.2) and the official FocuSFT.

    Example:
        >>> FirstOrder() == Unrolled(last=0)
        True
    """
    return Unrolled(last=0)


def _step_pullback(loss: InnerLoss, solver: Solver, step: int, hvp: HVP) -> Callable[..., Any]:
    """Return the pullback of one inner step with the second derivatives left to `hvp`.

    The step is `update(params, grad(params, outer, support), state, outer)`. Its pullback is that
    of `update`, which is cheap, plus the Hessian and mixed products along the cotangent of `grad`.
    """

    def run(args: tuple[Any, ...], cotangents: Any) -> tuple[Any, ...]:
        params, state, outer, support = args
        floats, rebuild = tree.partition(support, torch.is_floating_point)

        def explicit(p: Params, o: Params, s: list[Tensor]) -> Tensor:
            return loss(p, o, rebuild(s))

        grads, product = hvp(explicit, params, outer, floats)
        inputs, together = tree.partition((params, grads, state, outer))

        def update(*xs: Tensor) -> list[Tensor]:
            p, g, s, o = together(xs)
            return tree.tensors(solver.update(p, g, s, step, o))

        pulled = pullback(update, inputs, tree.leaves(cotangents[:2]), [True] * len(inputs))
        filled = [
            torch.zeros_like(x) if g is None else g for g, x in zip(pulled, inputs, strict=True)
        ]
        d_params, d_grads, d_state, d_outer = together(filled)
        h_params, m_outer, m_floats = product(d_grads)
        return (
            tree.add(d_params, h_params),
            d_state,
            tree.add(d_outer, m_outer),
            rebuild(m_floats),
        )

    return run
