"""An inner loop whose states live in a store until the backward pass goes through them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.autodiff.purity import watched
from metafocus.autodiff.recompute import Ambient
from metafocus.autodiff.stores import Store
from metafocus.autodiff.stores.places import Place
from metafocus.autodiff.stores.plans import Turn, kept_ahead, turns
from metafocus.errors import TransformError
from metafocus.rng import Drawn
from metafocus.solvers.descent import descend, segment
from metafocus.torch_internals import keeps_graph, outside_transforms, transforming
from metafocus.types import InnerLoss, Params, Solver, State


def refuse_transforms() -> None:
    """Raise inside transforms and compilers, which cannot see kept states."""
    if transforming():
        raise TransformError(
            "Unrolled(store=...) inside a transform (torch.func, vmap, mf.over_tasks, forward "
            "mode) or a compiler: the kept states would lose derivatives there. Use "
            'loss.backward() or mf.hypergrad outside of it, over_tasks(how="loop"), or '
            "Unrolled(recompute=True), which every transform sees through."
        )


class _Kept:
    """The kept states of one run: tensors on a shelf, what is no tensor beside it."""

    def __init__(self, place: Place):
        self.shelf = place.open()
        self.beside: dict[int, tuple[Any, Drawn]] = {}
        self.drawn: Drawn | None = None

    def put(self, key: int, state: Any) -> None:
        tensors, rebuild = pt.partition(state)
        self.drawn = Drawn(tensors).or_same(self.drawn)
        self.beside[key] = rebuild, self.drawn
        self.shelf.put(key, tensors)

    def get(self, key: int) -> tuple[Any, Drawn]:
        rebuild, drawn = self.beside[key]
        return rebuild(self.shelf.get(key)), drawn

    def drop(self, key: int) -> None:
        del self.beside[key]
        self.shelf.drop(key)


class StoredLoop:
    """Inner steps without a graph, taken again one by one in the backward pass.

    Args:
        loss: the inner loss.
        solver: the inner optimiser.
        steps: the numbers of the steps.
        path: after which of them the fast weights are wanted.
        store: which states are kept, and where.
    """

    def __init__(
        self, loss: InnerLoss, solver: Solver, steps: range, path: Sequence[int], store: Store
    ):
        self.loss = loss
        self.solver = solver
        self.steps = steps
        self.path = sorted({step for step in path if step in steps})
        self.plan = store.plan_for(len(steps))
        self.place = store.place

    def __call__(
        self, params: Params, state: State, outer: Params, support: Any
    ) -> tuple[Params, State, list[Tensor], list[Params]]:
        """Return what `segment` returns, without the state after the last step."""
        refuse_transforms()
        support = watched(support)
        inputs, self.rebuild = pt.partition((params, state, outer, support))
        self.ambient, self.drawn = Ambient(inputs), Drawn(inputs)
        self.kept: _Kept | None = None
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
            with self.ambient.first():
                losses, ends = self.run(inputs, keep=False)
            return ends[-1], None, losses, ends[:-1]
        found: list[Tensor] = []
        outputs = iter(_Stored.apply(self, found, *inputs))
        ends = [{k: next(outputs) for k in params} for _ in range(len(self.path) + 1)]
        return ends[-1], None, found, ends[:-1]

    def run(self, inputs: Sequence[Tensor], *, keep: bool) -> tuple[list[Tensor], list[Params]]:
        """Take all steps; return the losses, and the path with the last fast weights at its end."""
        params, state, outer, support = self.rebuild([x.detach() for x in inputs])
        self.kept = _Kept(self.place) if keep else None
        starts = [0, *kept_ahead(self.plan, 0, len(self.steps), 1)] if keep else [0]
        self.first = set(starts)
        losses, ends = [], []
        for begin, end in zip(starts, [*starts[1:], len(self.steps)], strict=True):
            # The first state are the inputs, which the graph keeps.
            if self.kept is not None and begin:
                self.kept.put(begin, (params, state))
            params, state, more, inside = descend(
                self.loss,
                self.solver,
                params,
                state,
                outer,
                support,
                self.steps[begin:end],
                differentiable=False,
                path=self.path,
            )
            losses += more
            ends += inside
        return losses, [*ends, params]

    def backward(
        self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the derivative by every input."""
        keeps = keeps_graph()
        if self.kept is None:
            # An earlier backward pass has used the states up.
            with outside_transforms(), self.ambient.again(self.drawn):
                self.run(inputs, keep=True)
        assert self.kept is not None
        try:
            return self._reversed(self.kept, _Reverse(self, inputs, wanted), cotangents, keeps)
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Give up the kept states; another backward pass would take all steps again."""
        if self.kept is not None:
            self.kept.shelf.close()
        self.kept = None

    def _reversed(
        self, kept: _Kept, reverse: _Reverse, cotangents: Sequence[Tensor | None], keeps: bool
    ) -> list[Tensor | None]:
        size = len(cotangents) // (len(self.path) + 1)
        ends = [cotangents[i : i + size] for i in range(0, len(cotangents), size)]
        given = dict(zip(self.path, ends, strict=False))
        reverse.meet(ends[-1])
        # Another backward pass through the same graph finds the states of the forward pass again,
        # unless their slots are needed.
        lasting = self.first if keeps and self.plan.slots == math.inf else set[int]()
        for turn in turns(self.plan, len(self.steps)):
            reverse.meet(given.get(self.steps[turn.step], ()))
            reverse.step(turn, kept)
            if turn.done and turn.begin and turn.begin not in lasting:
                kept.drop(turn.begin)
        if not lasting:
            self.forget()
        return reverse.total()


class _Reverse:
    """One backward pass: cotangents that go from step to step, and sums of those that do not.

    Under a batch of cotangents (`is_grads_batched`) steps are rebuilt once, outside of the batch.
    """

    def __init__(self, loop: StoredLoop, inputs: Sequence[Tensor], wanted: Sequence[bool]):
        self.loop = loop
        self.inputs = inputs
        params, state, *_ = loop.rebuild(inputs)
        self.first = params, state
        leaves = [
            x.detach().requires_grad_(w and pt.is_differentiable(x))
            for x, w in zip(inputs, wanted, strict=True)
        ]
        *_, self.outer, self.support = loop.rebuild(leaves)
        self.outside = pt.tensors(self.outer)
        self.carried: list[Tensor | None] = []
        self.sums: list[Tensor | None] = [None] * len(self.outside)
        self.own = [False] * len(self.outside)
        self.data: list[list[Tensor | None]] = []

    def meet(self, cotangents: Sequence[Tensor | None]) -> None:
        """Add cotangents of fast weights that the outer loss has seen."""
        self.carried += [None] * (len(cotangents) - len(self.carried))
        for i, c in enumerate(cotangents):
            known = self.carried[i]
            self.carried[i] = known if c is None else c if known is None else known + c

    def step(self, turn: Turn, kept: _Kept) -> None:
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
            found = torch.autograd.grad(
                [y for y, _ in pairs],
                [inputs[i] for i in chosen],
                [c for _, c in pairs],
                allow_unused=True,
            )
            for i, g in zip(chosen, found, strict=True):
                grads[i] = g
        here, there = len(before), len(before) + len(self.outside)
        self.carried = grads[:here]
        for i, g in enumerate(grads[here:there]):
            self._add(i, g)
        self.data.append(grads[there:])

    def _rebuilt(self, turn: Turn, kept: _Kept) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
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
        with torch.enable_grad():
            seen = pt.tensors(streams.part(self.support, self.loop.steps))[i]
        if len(self.loop.steps) == 1 or some[0].shape == whole.shape:
            summed = sum(some[1:], start=some[0])
            return torch.autograd.grad(seen, whole, summed)[0] if seen is not whole else summed
        filled = [torch.zeros_like(some[0]) if g is None else g for g in grads]
        return torch.autograd.grad(seen, whole, torch.cat(filled))[0]


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loop: StoredLoop, found: list[Tensor], *inputs: Tensor) -> Any:
        try:
            with loop.ambient.first():
                losses, ends = loop.run(inputs, keep=True)
        except BaseException:
            loop.forget()
            raise
        found += losses
        ctx.loop = loop
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        # Copies: the last fast weights may be in the path as well, or be inputs.
        return tuple(x.clone() for end in ends for x in end.values())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        twice = torch.is_grad_enabled()
        with torch.no_grad():
            grads = ctx.loop.backward(inputs, cotangents, wanted)
        if twice:
            depends = [x for x in (*inputs, *cotangents) if x is not None and x.requires_grad]
            grads = [None if g is None else _Once.apply(g, *depends) for g in grads]
        return None, None, *grads


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *depends: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise TransformError(
            "Unrolled(store=...) has first derivatives only: its states are not in the graph, and "
            "a second derivative would be wrong. Use Unrolled(recompute=True) for it."
        )
