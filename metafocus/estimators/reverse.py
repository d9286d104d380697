"""The way back through a stored inner loop, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.autodiff.recompute import Ambient
from metafocus.autodiff.stores.places import Place, Shelf
from metafocus.autodiff.stores.plans import Turn
from metafocus.autodiff.tape import has_custom_nodes
from metafocus.rng import Drawn
from metafocus.solvers.descent import descend, segment
from metafocus.torch_internals import outside_transforms, sole_vmap, transforming
from metafocus.types import InnerLoss, Params, Solver


class Loop(Protocol):
    """What the way back needs to know of an inner loop."""

    loss: InnerLoss
    solver: Solver
    steps: range
    rebuild: Callable[[Any], Any]
    ambient: Ambient
    drawn: Drawn


class Kept:
    """The kept states of one run: tensors in the store, other parts beside them."""

    def __init__(self, place: Place):
        self.shelf: Shelf = place.open()
        self.beside: dict[int, tuple[Any, Drawn]] = {}

    def put(self, key: int, state: Any) -> None:
        """Keep a state, with the random numbers that are drawn from here on."""
        tensors, rebuild = pt.partition(state)
        self.beside[key] = rebuild, Drawn.shared(tensors)
        self.shelf.put(key, tensors)

    def get(self, key: int) -> tuple[Any, Drawn]:
        """Return a state and its random numbers."""
        rebuild, drawn = self.beside[key]
        return rebuild(self.shelf.get(key)), drawn

    def drop(self, key: int) -> None:
        """Forget a state."""
        del self.beside[key]
        self.shelf.drop(key)


class Reverse:
    """One backward pass: cotangents that go from step to step, and sums of those that do not.

    Under a batch of cotangents (`is_grads_batched`) steps are rebuilt once, outside of the batch.
    """

    outer: Params
    support: Any

    def __init__(self, loop: Loop, inputs: Sequence[Tensor], wanted: Sequence[bool]):
        self.loop = loop
        self.inputs = inputs
        params, state, *_ = loop.rebuild(inputs)
        self.first: tuple[Any, Any] = params, state
        leaves = [
            x.detach().requires_grad_(w and pt.is_differentiable(x))
            for x, w in zip(inputs, wanted, strict=True)
        ]
        *_, self.outer, self.support = loop.rebuild(leaves)
        self.outside: list[Tensor] = pt.tensors(self.outer)
        self.carried: list[Tensor | None] = []
        self.sums: list[Tensor | None] = [None] * len(self.outside)
        self.own: list[bool] = [False] * len(self.outside)
        self.data: list[list[Tensor | None]] = []

    def meet(self, cotangents: Sequence[Tensor | None]) -> None:
        """Add cotangents of fast weights that the outer loss has seen."""
        self.carried += [None] * (len(cotangents) - len(self.carried))
        for i, c in enumerate(cotangents):
            known = self.carried[i]
            self.carried[i] = known if c is None else c if known is None else known + c

    def step(self, turn: Turn, kept: Kept) -> None:
        """Go through one step."""
        with outside_transforms():
            before, outputs, data = self._rebuilt(turn, kept)
        inputs = [*before, *self.outside, *data]
        chosen = [i for i, x in enumerate(inputs) if x.requires_grad]
        pairs = [
            (y, c)
            for y, c in zip(outputs, self.carried, strict=False)
            if c is not None and y.requires_grad
        ]
        grads: list[Tensor | None] = [None] * len(inputs)
        if pairs and chosen:
            ys, cs = [y for y, _ in pairs], [c for _, c in pairs]
            found = _pulled(ys, [inputs[i] for i in chosen], cs)
            for i, g in zip(chosen, found, strict=True):
                grads[i] = g
        here, there = len(before), len(before) + len(self.outside)
        self.carried = grads[:here]
        for i, g in enumerate(grads[here:there]):
            self._add(i, g)
        self.data.append(grads[there:])

    def _rebuilt(self, turn: Turn, kept: Kept) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Take one step with a graph: the tensors before it, after it, and the data it saw."""
        loop = self.loop
        now, drawn = kept.get(turn.begin) if turn.begin else (self.first, loop.drawn)
        params, state = pt.detach(now)
        outer, support = pt.detach(self.outer), pt.detach(self.support)
        with loop.ambient.again(drawn):
            stops = [*turn.keep, turn.step]
            for begin, end in zip([turn.begin, *turn.keep], stops, strict=True):
                taken = loop.steps[begin:end]
                params, state, _, _ = descend(
                    loop.loss,
                    loop.solver,
                    params,
                    state,
                    outer,
                    support,
                    taken,
                    differentiable=False,
                )
                if end != turn.step:
                    kept.put(end, (params, state))
            before, rebuild = pt.partition((params, state))
            before = [x.detach().requires_grad_(pt.is_differentiable(x)) for x in before]
            one = loop.steps[turn.step : turn.step + 1]
            data, together = pt.partition(streams.part(self.support, one))
            data = [x.detach().requires_grad_(x.requires_grad) for x in data]
            with torch.enable_grad():
                take = segment(loop.loss, loop.solver, one)
                *after, _, _ = take(*rebuild(before), self.outer, together(data))
        return before, pt.tensors(after), data

    def _add(self, i: int, grad: Tensor | None) -> None:
        known = self.sums[i]
        if grad is None or known is None:
            self.sums[i] = known if grad is None else grad
        elif self.own[i] and not transforming():
            known.add_(grad)
        else:
            self.sums[i] = known + grad
            self.own[i] = True

    def total(self) -> list[Tensor | None]:
        """Return the derivative by every input of the loop."""
        tensors = pt.tensors(self.support)
        each = [list(reversed(grads)) for grads in zip(*self.data, strict=True)]
        data = [
            self._of_data(i, x, grads)
            for i, (x, grads) in enumerate(zip(tensors, each, strict=True))
        ]
        return [*self.carried, *self.sums, *data]

    def _of_data(self, i: int, whole: Tensor, grads: list[Tensor | None]) -> Tensor | None:
        """Return the derivative by one tensor of the support: slice by slice, or summed up."""
        some = [g for g in grads if g is not None]
        if not some:
            return None
        with outside_transforms(), torch.enable_grad():
            seen = pt.tensors(streams.part(self.support, self.loop.steps))[i]
        if len(self.loop.steps) == 1 or some[0].shape == whole.shape:
            summed = sum(some[1:], start=some[0])
            return torch.autograd.grad(seen, whole, summed)[0] if seen is not whole else summed
        filled = [torch.zeros_like(some[0]) if g is None else g for g in grads]
        return torch.autograd.grad(seen, whole, torch.cat(filled))[0]


def _pulled(
    ys: list[Tensor], xs: list[Tensor], cotangents: list[Tensor]
) -> Sequence[Tensor | None]:
    """Return the derivatives of one step, also for a batch of cotangents."""
    batch = sole_vmap()
    if batch is None or not has_custom_nodes(ys):
        return torch.autograd.grad(ys, xs, cotangents, allow_unused=True)
    # Kernels of attention and the like have no rule for a batch in the backward pass: one by one.
    plain = [batch.outside(c) for c in cotangents]
    with outside_transforms():
        rows = [
            torch.autograd.grad(ys, xs, [c[i] for c in plain], retain_graph=True, allow_unused=True)
            for i in range(batch.size)
        ]
        stacked = [None if row[0] is None else torch.stack(row) for row in zip(*rows, strict=True)]
    return [None if g is None else batch.inside(g) for g in stacked]
