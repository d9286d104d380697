"""One trial evaluation of the inner loss that finds an ill-posed problem before it goes wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from metafocus import tree
from metafocus.autodiff import scalar
from metafocus.errors import ClosureError, ProblemError
from metafocus.problem import Problem
from metafocus.types import Params


def probe(problem: Problem, outer: Params, support: Any, *, explicit: bool) -> Problem:
    """Evaluate the inner loss once on detached tensors; return the problem with its start fixed.

    The returned problem's `init` gives the start that was probed, so a random `init` is drawn
    from once. Random numbers used by the trial are given back.

    Raises:
        ProblemError: if the loss is not a scalar, asks for a key that `init` did not return, or
            never reads one that it did.
        ClosureError: with `explicit`, if the loss still needs a derivative although all its
            arguments are constants: it closes over a tensor that the estimator cannot see.
    """
    start = problem.start(outer)
    fast = _Recorder(tree.detach(start))
    devices = sorted({x.get_device() for x in tree.tensors((start, outer)) if x.is_cuda})
    with torch.random.fork_rng(devices), torch.enable_grad():
        value = _evaluate(problem, fast, outer, support)
    if fast and fast.unread:
        raise ProblemError(
            f"init returns {sorted(fast.unread)[0]!r}, which inner_loss never reads: it would "
            f"never be adapted. Remove it from init, or use it. init returned {sorted(fast)}."
        )
    if explicit and is_tracked(value):
        raise ClosureError(
            "inner_loss closes over a tensor that requires grad and is not in outer: this "
            "estimator differentiates explicit tensors only and would treat it as a constant. "
            "Pass it in outer (from a module: dict(module.named_parameters())), freeze it with "
            "requires_grad_(False), or use Unrolled() without recompute."
        )
    return dataclasses.replace(problem, init=lambda _: start)


def _evaluate(problem: Problem, fast: _Recorder, outer: Params, support: Any) -> Tensor:
    slow, data = tree.detach(outer), tree.detach(support)
    try:
        value = problem.inner_loss(fast, slow, data)
    except KeyError as error:
        key = error.args[0] if error.args else None
        if not isinstance(key, str) or key in fast:
            raise
        raise ProblemError(
            f"inner_loss asks for {key!r}; init returned {sorted(fast)} and outer holds "
            f"{sorted(outer)}. Return it from init, or correct the name."
        ) from error
    except AttributeError as error:
        unknown = [k for k in fast if str(error).endswith(repr(k.rpartition(".")[2]))]
        if not unknown:
            raise
        raise ProblemError(
            f"inner_loss does not know the fast weight {unknown[0]!r} ({error}). Names are "
            "module paths, as in dict(module.named_parameters())."
        ) from error
    except Exception:
        # A loss that takes dicts apart by type does not see through the recorder.
        fast.unread.clear()
        value = problem.inner_loss(dict(fast), slow, data)
    return scalar(value, "inner_loss")


def is_tracked(x: Tensor) -> bool:
    """Return whether a tensor needs a derivative at any live level of differentiation."""
    while True:
        if x.requires_grad:
            return True
        if not (_functorch.is_functorch_wrapped_tensor(x)):
            return False
        x = _functorch.get_unwrapped(x)


class _Recorder(dict[str, Tensor]):
    """A dict that remembers which of its values were never read."""

    def __init__(self, values: Params):
        super().__init__(values)
        self.unread = set(values)

    def __getitem__(self, key: str) -> Tensor:
        self.unread.discard(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.unread.discard(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        # Overriding this sends dict(x), {**x} and update() through __getitem__.
        return super().__iter__()

    def items(self) -> Any:
        self.unread.clear()
        return super().items()

    def values(self) -> Any:
        self.unread.clear()
        return super().values()

    def copy(self) -> Params:
        return dict(self.items())

    def __or__(self, other: Any) -> Any:
        return dict(self.items()) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self.items())
