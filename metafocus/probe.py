"""One trial evaluation of the inner loss that finds an ill-posed problem before it goes wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metafocus import tree
from metafocus.autodiff.backends import scalar
from metafocus.errors import ClosureError, ProblemError
from metafocus.levels import is_tracked, transforming
from metafocus.problem import Problem
from metafocus.solvers import Given
from metafocus.types import Params, Solver


def probe(
    problem: Problem, solver: Solver, outer: Params, support: Any, *, explicit: bool
) -> Problem:
    """Evaluate the inner loss once on detached tensors; return the problem with its start fixed.

    The returned problem's `init` gives the start that was probed, so a random `init` is drawn
    from once. Random numbers used by the trial are given back.

    Raises:
        ProblemError: if the loss is not a scalar, asks for a key that `init` did not return, or
            never reads one that it did or does not depend on it.
        ClosureError: with `explicit`, if the loss or the solver still needs a derivative although
            all arguments are constants: it closes over a tensor that the estimator cannot see.
    """
    start = problem.start(outer)
    fast, slow = _Recorder(tree.detach(start)), tree.detach(outer)
    devices = sorted({x.get_device() for x in tree.tensors((start, outer)) if x.is_cuda})
    with torch.random.fork_rng(devices), torch.enable_grad():
        value = _evaluate(problem, fast, _Recorder(slow), tree.detach(support))
        point = tree.detach(start)
        state = solver.init(point)
        # A given solution has no steps and is a constant.
        steps = point and not isinstance(solver, Given)
        step = solver.update(point, tree.zeros_like(point), state, 0, slow) if steps else {}
        if fast.in_bulk and not transforming():
            _refuse_ignored(problem, point, slow, tree.detach(support))
    if fast.unread:
        raise ProblemError(
            f"init returns {sorted(fast.unread)[0]!r}, which inner_loss never reads: it would "
            f"never be adapted. Remove it from init, or use it. init returned {sorted(start)}."
        )
    if explicit:
        _refuse_closures("inner_loss", value)
        _refuse_closures("the solver (its lr?)", step)
    return dataclasses.replace(problem, init=lambda _: start)


def _refuse_ignored(problem: Problem, point: Params, slow: Params, data: Any) -> None:
    """Raise for a name that was handed on with the others but that nothing depends on.

    `torch.func.functional_call` ignores unknown names inside a module. A module without any
    name in use is let through: an expert that no token was routed to looks like this.
    """
    leaves = {k: v.detach().requires_grad_() for k, v in point.items()}
    value = problem.inner_loss(leaves, slow, data)
    unused = set(leaves)
    if value.requires_grad:
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        unused = {k for k, g in zip(leaves, found, strict=True) if g is None}
    alive = {k.rpartition(".")[0] for k in set(leaves) - unused}
    ignored = sorted(k for k in unused if not alive or k.rpartition(".")[0] in alive)
    if ignored:
        raise ProblemError(
            f"inner_loss does not depend on the fast weight {ignored[0]!r}: is the name right? "
            f"Names are module paths, as in dict(module.named_parameters()). init returned "
            f"{sorted(leaves)}."
        )


def _refuse_closures(who: str, result: Any) -> None:
    if any(is_tracked(x) for x in tree.tensors(result)):
        raise ClosureError(
            f"{who} closes over a tensor that requires grad and is not in outer: this "
            "estimator differentiates explicit tensors only and would treat it as a constant. "
            "Pass it in outer (from a module: dict(module.named_parameters())), freeze it with "
            "requires_grad_(False), or use Unrolled() without recompute."
        )


def _evaluate(problem: Problem, fast: _Recorder, slow: _Recorder, data: Any) -> Tensor:
    def plainly() -> Tensor:
        # A loss that takes dicts apart by type does not see through the recorder.
        fast.unread.clear()
        return problem.inner_loss(dict(fast), dict(slow), data)

    try:
        value = problem.inner_loss(fast, slow, data)
    except KeyError as error:
        missing = fast.missing or slow.missing
        if not missing:
            raise
        raise ProblemError(
            f"inner_loss asks for {missing[-1]!r}; init returned {sorted(fast)} and outer holds "
            f"{sorted(slow)}. Return it from init, or correct the name."
        ) from error
    except AttributeError as error:
        # torch names the attribute last, in quotes or backticks.
        attribute = str(error).rpartition(" ")[2].strip("'`\".")
        unknown = [k for k in fast if attribute in k.split(".")]
        if not unknown:
            return scalar(plainly(), "inner_loss")
        raise ProblemError(
            f"inner_loss does not know the fast weight {unknown[0]!r} ({error}). Names are "
            "module paths, as in dict(module.named_parameters())."
        ) from error
    except Exception:
        value = plainly()
    return scalar(value, "inner_loss")


class _Recorder(dict[str, Tensor]):
    """A dict that remembers which of its values were never read, and what it was asked for."""

    def __init__(self, values: Params):
        super().__init__(values)
        self.unread = set(values)
        self.missing: list[str] = []
        self.in_bulk = False

    def __missing__(self, key: str) -> Tensor:
        self.missing.append(key)
        raise KeyError(key)

    def __getitem__(self, key: str) -> Tensor:
        self.unread.discard(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.unread.discard(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.unread.discard(key)
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[str]:
        # Overriding this sends dict(x), {**x} and update() through __getitem__.
        return super().__iter__()

    def items(self) -> Any:
        self.unread.clear()
        self.in_bulk = True
        return super().items()

    def values(self) -> Any:
        self.unread.clear()
        self.in_bulk = True
        return super().values()

    def copy(self) -> Params:
        return dict(self.items())

    def __or__(self, other: Any) -> Any:
        return dict(self.items()) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self.items())
