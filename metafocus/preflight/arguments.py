"""Names and closures: what a loss asks for, ignores, or takes from elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metafocus import params as pt
from metafocus.autodiff.tape import foreign_leaves
from metafocus.checks import scalar
from metafocus.errors import ClosureError, ProblemError
from metafocus.torch_internals import (
    innermost,
    is_batched,
    is_tracked,
    pytree,
    raised_by_functional_call,
    sole_vmap,
    tape_of_its_own,
    transforming,
)
from metafocus.types import InnerLoss, Params


def refuse_hidden(support: Any, data: Any) -> None:
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


def refuse_sealed(data: Any) -> None:
    """Raise if the data holds tensors in a container that an explicit estimator cannot open.

    Raises:
        ClosureError: naming the container.
    """
    for name, tensors in pt.sealed(data).items():
        if any(is_tracked(x) or is_batched(x) for x in tensors):
            raise ClosureError(
                f"the support holds a {name}, which torch does not know as a container: this "
                "estimator cannot see its tensors and would lose their derivative. Pass a dict, "
                "list, tuple or NamedTuple of them (`dict(batch)`, `vars(batch)`), or use "
                "Unrolled() without recompute."
            )


def evaluated(inner_loss: InnerLoss, fast: Params, slow: Params, data: Any) -> Tensor:
    """Return the loss; an error because of a name becomes one that says which names there are."""
    try:
        with explained("inner_loss", fast, data, "support"):
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


@contextlib.contextmanager
def explained(who: str, fast: Params, data: Any, half: str) -> Iterator[None]:
    """Say what in the data often makes a loss fail, if it fails inside the `with` block.

    Args:
        who: the name of the loss.
        fast: the fast weights that it is given.
        data: the data that it is given.
        half: whether they are the support or the query.

    Raises:
        ProblemError: naming what in the data is odd.
    """
    try:
        yield
    except (TypeError, RuntimeError) as error:
        reason = _odd_data(fast, data, half)
        if reason is None:
            raise
        raise ProblemError(f"{who} failed, and {reason}. The failure: {error}") from error


def _odd_data(fast: Params, data: Any, half: str) -> str | None:
    """Return what in the data often makes a loss fail, and what to do about it."""
    leaves = pytree.tree_leaves(data)
    if any(type(x).__module__ == "numpy" for x in leaves):
        return f"the {half} holds NumPy arrays: pass tensors, such as torch.from_numpy(x).float()"
    if leaves and all(isinstance(x, int | float) for x in leaves):
        return f"the {half} holds lists of numbers: pass tensors, such as torch.tensor(x)"
    kinds = {x.dtype for x in leaves if isinstance(x, Tensor) and x.is_floating_point()}
    types = {x.dtype for x in fast.values()}
    places, homes = (
        {x.device for x in some if isinstance(x, Tensor)} for some in (leaves, fast.values())
    )
    if places and homes and not places & homes:
        a, b = (" and ".join(sorted(map(str, some))) for some in (places, homes))
        return f"the {half} is on {a} where the fast weights are on {b}: move it, as in x.to({b!r})"
    if kinds and types and not kinds & types:
        a, b = (" and ".join(sorted(map(str, some))) for some in (kinds, types))
        return f"the {half} is {a} where the fast weights are {b}: convert one, as in x.to({b})"
    return None


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


def unused_by(loss: Callable[[Params], Tensor], at: Params) -> set[str]:
    """Return the names of the tensors that a scalar does not depend on; inside transforms too."""
    if not transforming():
        # The tape accepts what a transform refuses: batch norm that counts its batches, a loss
        # that builds a graph of its own, custom Functions of the old form.
        leaves = {k: v.detach().requires_grad_() for k, v in at.items()}
        return unused_in(loss(dict(leaves)), leaves)
    with tape_of_its_own() as tape:
        leaves = {k: tape.leaf(v) for k, v in at.items()}
        value = loss(dict(leaves))
        return unused_in(value, leaves) if tape.holds(value) else set(leaves)


def unused_in(value: Tensor, leaves: Params) -> set[str]:
    """Return the names of the leaves that the graph of a scalar does not reach."""
    if not value.requires_grad or not leaves:
        return set(leaves)
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {k for k, g in zip(leaves, found, strict=True) if g is None}


def refuse_ignored(unused: set[str], point: Params) -> None:
    """Raise for a fast weight that the loss does not depend on.

    `torch.func.functional_call` ignores unknown names inside a module. A module without any
    name in use is let through: an expert that no token was routed to looks like this.
    """
    used = {k.rpartition(".")[0] for k in set(point) - unused}
    if unused and unused == set(point):
        raise ProblemError(
            f"inner_loss does not depend on the fast weights {sorted(point)}: nothing would be "
            "adapted. Use fast in it, as in torch.func.functional_call(net, fast, (x,)). "
            "no_grad(), detach(), .item() and NumPy cut the derivative."
        )
    ignored = sorted(k for k in unused if not used or k.rpartition(".")[0] in used)
    if ignored:
        raise ProblemError(
            f"inner_loss does not depend on the fast weight {ignored[0]!r}: it would never be "
            f"adapted. init returned {sorted(point)}; names are module paths, as in "
            "dict(module.named_parameters()). Correct the name, use the weight, or leave it out "
            "of init."
        )


def refuse_closures(who: str, results: Iterable[Tensor], made: list[Tensor]) -> None:
    """Raise if results of constants need a derivative: they come from a tensor closed over."""
    for x in results:
        # A loss may build a graph of its own, such as a gradient penalty.
        tape = innermost(x) if sole_vmap() else x
        if is_tracked(x) and (not tape.requires_grad or foreign_leaves(tape, made)):
            raise ClosureError(
                f"{who} closes over a tensor that requires grad and is not in outer: this "
                "estimator differentiates explicit tensors only and would treat it as a constant. "
                "Pass it in outer (from a module: mf.trainable(module)), freeze it with "
                "requires_grad_(False), or use Unrolled() without recompute."
            )


@contextlib.contextmanager
def new_tensors() -> Iterator[list[Tensor]]:
    """Collect the tensors that torch functions return inside a `with` block."""
    with _Recorded() as recorded:
        yield recorded.made


class _Recorded(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += pt.tensors(out)
        return out
