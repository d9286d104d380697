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
from metafocus.solvers.descent import checked
from metafocus.torch_internals import (
    foreign_leaves,
    is_batched,
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
    if explicit and streams.is_opaque(support):
        _refuse_hidden(support, data)
    data = pt.detach(data)
    with kept(pt.tensors((start, outer))), torch.enable_grad(), new_tensors() as made:
        value = _evaluated(inner_loss, point, slow, data)
        if explicit:
            _refuse_closures("inner_loss", [value], made)
        # A given solution has no steps and is a constant.
        if point and not isinstance(solver, Given):
            own_rule = getattr(solver, "direction", None)
            if explicit:
                move = pt.zeros_like(point)
                if own_rule is not None:
                    value, move = checked(own_rule(inner_loss, point, slow, data), point)
                    _refuse_closures("the solver (its direction)", [value, *move.values()], made)
                step = solver.update(point, pt.detach(move), solver.init(point), 0, slow)
                _refuse_closures("the solver (its lr?)", pt.tensors(step), made)
            if own_rule is None:
                _refuse_ignored(inner_loss, point, slow, data)


def _refuse_hidden(support: Any, data: Any) -> None:
    """Raise if a stream gives tensors that an explicit estimator would have to see and cannot."""
    name = type(getattr(support, "stream", support)).__name__
    tensors = pt.tensors(data)
    if any(map(is_tracked, tensors)):
        why = "depend on something that requires grad: the estimator would lose its derivative"
    elif any(map(is_batched, tensors)):
        why = "differ from task to task of a vmap: the estimator cannot see that"
    else:
        return
    raise ClosureError(
        f"the stream of type {name} gives tensors that {why}. Use mf.PerStep, whose tensors are "
        "visible, or Unrolled() without recompute."
    )


def _evaluated(inner_loss: InnerLoss, fast: Params, slow: Params, data: Any) -> Tensor:
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


def _refuse_ignored(inner_loss: InnerLoss, point: Params, slow: Params, data: Any) -> None:
    """Raise for a fast weight that the loss does not depend on.

    `torch.func.functional_call` ignores unknown names inside a module. A module without any
    name in use is let through: an expert that no token was routed to looks like this.
    """
    unused = unused_by(lambda fast: scalar(inner_loss(fast, slow, data), "inner_loss"), point)
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
