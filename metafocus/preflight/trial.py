"""The trial itself: one evaluation of the inner loss, its gradient, and one update."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus.autodiff import recompute
from metafocus.autodiff.safe_operators.swapping import Swapped
from metafocus.autodiff.tape import foreign_nodes
from metafocus.calls import note
from metafocus.errors import MetafocusError, ProblemError
from metafocus.preflight.arguments import (
    evaluated,
    new_tensors,
    refuse_closures,
    refuse_ignored,
    unused_by,
    unused_in,
)
from metafocus.preflight.draws import refused_draws
from metafocus.preflight.kernels import (
    refuse_lost_first_derivatives,
    refuse_lost_second_derivatives,
)
from metafocus.preflight.own_gradients import OwnGradients, hooked
from metafocus.preflight.writes import hidden_state, refused_writes
from metafocus.rng import replayed
from metafocus.solvers import Given
from metafocus.solvers.descent import checked
from metafocus.torch_internals import outside_transforms, plain
from metafocus.types import InnerLoss, Params, Solver


class Trial:
    """Runs a loss and an update on constants, and refuses what would go wrong later.

    Args:
        inner_loss: `(fast, slow, data) -> scalar`.
        solver: the inner optimiser.
        explicit: whether the estimator differentiates explicit tensors only.
        twice: whether the estimator differentiates the gradient of the inner loss.
        redraws: whether the loss is run again for its derivative.

    Attributes:
        swapped: the block in which the loss ran.
        own: what the loss does with gradients itself.
    """

    def __init__(
        self,
        inner_loss: InnerLoss,
        solver: Solver,
        *,
        explicit: bool,
        twice: bool,
        redraws: bool,
    ):
        self.inner_loss = inner_loss
        self.solver = solver
        self.explicit = explicit
        self.twice = twice
        self.redraws = redraws
        self.own_rule: Any = getattr(solver, "direction", None)
        self.swapped: Swapped = Swapped(once=True)
        self.own: OwnGradients = OwnGradients()

    def on_tape(self, fast: Params, slow: Params, data: Any) -> None:
        """Try outside transforms: one evaluation for all checks."""
        given = [(f"the fast weight {k!r}", v) for k, v in fast.items()]
        given += [(f"the outer parameter {k!r}", v) for k, v in slow.items()]
        given += [("the support", x) for x in pt.tensors(data)]
        leaves = {k: v.detach().requires_grad_() for k, v in fast.items()}
        again = replayed(self.inner_loss, pt.tensors((fast, slow, data)))
        writes = refused_writes("inner_loss", given, self.inner_loss)
        with self._draws("inner_loss"), writes as moved:
            searched = recompute.searched()
            with new_tensors() as made, self.own as own, self.swapped, searched as inside:
                value = self._evaluated(given, leaves, fast, slow, data)
            if any(x.grad is not None for x in leaves.values()):
                raise ProblemError(
                    "inner_loss calls backward(). Return the loss only: the solver takes its "
                    "gradient."
                )
            kernels = sorted({*foreign_nodes([value]), *inside, *own.kernels})
            self._judge(unused_in(value, leaves), [value], [*made, *leaves.values()], fast)
            if own.hooked and self.explicit:
                raise hooked("inner_loss", "which the products of this estimator do not follow")
        states = [*moved.tensors, *(moved.numbers if self.redraws else ())]
        if states:
            with self._draws("inner_loss"), Swapped(once=True):
                _refuse_another_value(states[0], value, again(dict(leaves), dict(slow), data))
        if self._takes_steps(fast):
            state = self.solver.init(fast)
            given += [("the solver's state", x) for x in pt.tensors(state)]
            with self._draws("the solver"), refused_writes("solver.update", given, self.solver):
                self._update(state, fast, slow, data)
        note("custom kernels", ", ".join(kernels) or "none in the graph of the inner loss")
        refuse_lost_first_derivatives("inner_loss", self.inner_loss, fast, slow, data, own)
        if self.twice and kernels:
            refuse_lost_second_derivatives("inner_loss", self.inner_loss, fast, slow, data, kernels)

    def in_transforms(self, fast: Params, slow: Params, data: Any) -> None:
        """Try inside transforms: the first task as if there were none, then what they hide."""
        try:
            with outside_transforms():
                self.on_tape(*first_task((fast, slow, data)))
            alone = True
        except MetafocusError:
            raise
        except Exception:
            # A loss that closes over a tensor of a transform cannot run outside of it. Its names
            # are checked below; torch itself refuses writes to such a tensor.
            alone = False
        if alone and not self.explicit:
            return

        def loss(point: Params) -> Tensor:
            return evaluated(self.inner_loss, point, slow, data)

        with new_tensors() as made, self.swapped:
            unused = unused_by(loss, fast)
            self._judge(unused, [loss(fast)] if self.explicit else [], made, fast)
        if self.explicit and self._takes_steps(fast):
            self._update(self.solver.init(fast), fast, slow, data)

    def _evaluated(
        self, given: list[tuple[str, Tensor]], leaves: Params, fast: Params, slow: Params, data: Any
    ) -> Tensor:
        try:
            return evaluated(self.inner_loss, leaves, slow, data)
        except RuntimeError:
            self._refuse_writes_to_leaves(given, fast, slow, data)
            raise

    def _refuse_writes_to_leaves(self, given: list[tuple[str, Tensor]], *at: Any) -> None:
        """Raise for a loss that writes to its weights; torch refuses that where they are leaves."""
        with suppress(RuntimeError, TypeError):
            with refused_writes("inner_loss", given, self.inner_loss):
                self.inner_loss(*at)

    def _draws(self, who: str) -> AbstractContextManager[None]:
        return refused_draws(who, explicit=self.redraws)

    def _takes_steps(self, fast: Params) -> bool:
        # A given solution has no steps and is a constant.
        return bool(fast) and not isinstance(self.solver, Given)

    def _judge(
        self, unused: set[str], results: list[Tensor], made: list[Tensor], fast: Params
    ) -> None:
        if self._takes_steps(fast) and self.own_rule is None:
            refuse_ignored(unused, fast)
        if self.explicit:
            refuse_closures("inner_loss", results, made)
            note("preflight", "the inner loss closes over no tensor that requires grad")

    def _update(self, state: Any, fast: Params, slow: Params, data: Any) -> None:
        with new_tensors() as made:
            move = pt.zeros_like(fast)
            results: list[Tensor] = []
            if self.own_rule is not None:
                value, move = checked(self.own_rule(self.inner_loss, fast, slow, data), fast)
                results = [value, *move.values()]
            after = self.solver.update(dict(fast), pt.detach(move), state, 0, dict(slow))
        _check_update(after, fast)
        if self.explicit:
            refuse_closures("the solver (its direction)", results, made)
            refuse_closures("the solver (its lr?)", pt.tensors(after), made)


def _check_update(after: Any, point: Params) -> None:
    if not isinstance(after, tuple) or len(after) != 2 or not isinstance(after[0], dict):
        raise ProblemError(
            "solver.update must return (fast weights, state), a dict and any pytree, got "
            f"{type(after).__name__}."
        )
    if set(after[0]) != set(point):
        odd = sorted(set(after[0]) ^ set(point))
        raise ProblemError(
            f"solver.update must return every fast weight; {odd[0]!r} is on one side only. Fast "
            f"weights: {sorted(point)}."
        )


def first_task(tree: Any) -> Any:
    """Return detached tensors, and of a batch of tasks those of the first one."""
    inputs, rebuild = pt.partition(tree)
    return rebuild([plain(x).detach() for x in inputs])


def _refuse_another_value(state: str, first: Tensor, second: Tensor) -> None:
    """Raise if a loss has another value at the same point: a log, or a cache, changes none."""
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    if not torch.allclose(first, second, rtol=tolerance, atol=0.0, equal_nan=True):
        raise hidden_state("inner_loss", state)
