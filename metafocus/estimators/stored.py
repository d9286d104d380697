"""An inner loop whose states live in a store until the backward pass goes through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff.purity import watched
from metafocus.autodiff.recompute import Ambient
from metafocus.autodiff.stores import Store
from metafocus.autodiff.stores.places import Place
from metafocus.autodiff.stores.plans import Plan, kept_ahead, turns
from metafocus.errors import TransformError
from metafocus.estimators.reverse import Kept, Reverse
from metafocus.rng import Drawn
from metafocus.solvers.descent import descend
from metafocus.torch_internals import (
    keeps_graph,
    outside_transforms,
    transforming,
)
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


class StoredLoop:
    """Inner steps without a graph, taken again one by one in the backward pass.

    Args:
        loss: the inner loss.
        solver: the inner optimiser.
        steps: the numbers of the steps.
        path: after which of them the fast weights are wanted.
        store: which states are kept, and where.
    """

    ambient: Ambient
    drawn: Drawn

    def __init__(
        self, loss: InnerLoss, solver: Solver, steps: range, path: Sequence[int], store: Store
    ):
        self.loss = loss
        self.solver = solver
        self.steps = steps
        self.path: list[int] = sorted({step for step in path if step in steps})
        self.plan: Plan = store.plan_for(len(steps))
        self.place: Place = store.place

    def __call__(
        self, params: Params, state: State, outer: Params, support: Any
    ) -> tuple[Params, State, list[Tensor], list[Params]]:
        """Return what `segment` returns, without the state after the last step."""
        refuse_transforms()
        support = watched(support)
        inputs, rebuild = pt.partition((params, state, outer, support))
        self.rebuild: Callable[[Any], Any] = rebuild
        self.ambient, self.drawn = Ambient(inputs), Drawn(inputs)
        self.kept: Kept | None = None
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
        self.kept = Kept(self.place) if keep else None
        starts = [0, *kept_ahead(self.plan, 0, len(self.steps), 1)] if keep else [0]
        self.first: set[int] = set(starts)
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
            with outside_transforms():
                reverse = Reverse(self, inputs, wanted)
            return self._reversed(self.kept, reverse, cotangents, keeps)
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Give up the kept states; another backward pass would take all steps again."""
        if self.kept is not None:
            self.kept.shelf.close()
        self.kept = None

    def _reversed(
        self, kept: Kept, reverse: Reverse, cotangents: Sequence[Tensor | None], keeps: bool
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
