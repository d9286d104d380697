"""One trial evaluation of the inner loss that finds an ill-posed problem before it goes wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from metafocus import params as pt
from metafocus import streams
from metafocus.checks import scalar
from metafocus.errors import ClosureError, ProblemError
from metafocus.rng import kept
from metafocus.solvers import Given
from metafocus.torch_internals import (
    foreign_leaves,
    is_tracked,
    new_tensors,
    raised_by_functional_call,
    unused_by,
)
from metafocus.types import InnerLoss, Params, Solver


def preflight(
    inner_loss: InnerLoss,
    solver: Solver,
    start: Params,
    outer: Params,
    support: Any,
    *,
    explicit: bool,
) -> None:
    """Evaluate the inner loss, its gradient and one update on detached tensors, and judge them.

    Random numbers used by the trial are given back.

    Args:
        inner_loss: `(fast, slow, data) -> scalar`.
        solver: the inner optimiser.
        start: the fast weights before the first step.
        outer: the slow weights.
        support: what the inner loss sees; of a stream, the data of step 0.
        explicit: whether the estimator differentiates explicit tensors only.

    Raises:
        ProblemError: if the loss is not a scalar, asks for a name that it is not given, or does
            not depend on one of the fast weights.
        ClosureError: with `explicit`, if the loss or the solver still needs a derivative although
            all arguments are constants: it closes over a tensor that the estimator cannot see.
    """
    point, slow, data = pt.detach(start), pt.detach(outer), streams.at(support, 0)
    data = pt.detach(data)
    steps = bool(point) and not isinstance(solver, Given)

    def loss(fast: Params) -> Tensor:
        return _evaluated(inner_loss, fast, slow, data)

    with kept(pt.tensors((start, outer))), torch.enable_grad():
        if steps and getattr(solver, "direction", None) is None:
            _refuse_ignored(unused_by(loss, point), point)
        elif not explicit:
            loss(point)
        if explicit:
            with new_tensors() as made:
                _refuse_closures("inner_loss", [loss(point)], made)
                if steps:
                    state = solver.init(point)
                    after = solver.update(point, pt.zeros_like(point), state, 0, slow)
                    _refuse_closures("the solver (its lr?)", pt.tensors(after), made)


def _evaluated(inner_loss: InnerLoss, fast: Params, slow: Params, data: Any) -> Tensor:
    """Return the loss; an error because of a name becomes one that says which names there are."""
    try:
        return scalar(inner_loss(dict(fast), dict(slow), data), "inner_loss")
    except KeyError as error:
        asked = _asked(inner_loss, fast, slow, data)
        if not asked:
            raise
        raise ProblemError(
            f"inner_loss asks for {asked[-1]!r}; init returned {sorted(fast)} and outer holds "
            f"{sorted(slow)}. Return it from init, or correct the name."
        ) from error
    except AttributeError as error:
        if not raised_by_functional_call(error):
            raise
        raise ProblemError(
            f"inner_loss does not know one of the fast weights {sorted(fast)}: {error}. Names are "
            "module paths, as in dict(module.named_parameters())."
        ) from error


def _asked(inner_loss: InnerLoss, fast: Params, slow: Params, data: Any) -> list[str]:
    """Return the names that the loss asks its weights for in vain."""
    missing: list[str] = []

    class Asked(dict[str, Tensor]):
        def __missing__(self, key: str) -> Tensor:
            missing.append(key)
            raise KeyError(key)

    try:
        inner_loss(Asked(fast), Asked(slow), data)
    except Exception:
        pass
    return missing


def _refuse_ignored(unused: set[str], point: Params) -> None:
    """Raise for a fast weight that the loss does not depend on.

    `torch.func.functional_call` ignores unknown names inside a module. A module without any
    name in use is let through: an expert that no token was routed to looks like this.
    """
    used = {k.rpartition(".")[0] for k in set(point) - unused}
    ignored = sorted(k for k in unused if not used or k.rpartition(".")[0] in used)
    if ignored:
        raise ProblemError(
            f"inner_loss does not depend on the fast weight {ignored[0]!r}: it would never be "
            f"adapted. init returned {sorted(point)}; names are module paths, as in "
            "dict(module.named_parameters()). Correct the name, use the weight, or leave it out "
            "of init."
        )


def _refuse_closures(who: str, results: Iterable[Tensor], made: list[Tensor]) -> None:
    for x in results:
        # A loss may build a graph of its own, such as a gradient penalty.
        if is_tracked(x) and (not x.requires_grad or foreign_leaves(x, made)):
            raise ClosureError(
                f"{who} closes over a tensor that requires grad and is not in outer: this "
                "estimator differentiates explicit tensors only and would treat it as a constant. "
                "Pass it in outer (from a module: mf.trainable(module)), freeze it with "
                "requires_grad_(False), or use Unrolled() without recompute."
            )
