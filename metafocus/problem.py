"""The bilevel problem: four functions, and the checks of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metafocus import params as pt
from metafocus.checks import function, not_negative, scalar, takes
from metafocus.episodes import as_episode
from metafocus.errors import ProblemError
from metafocus.factories import picklable
from metafocus.torch_internals import innermost
from metafocus.types import Episode, InnerLoss, OuterLoss, Params


def from_slow(slow: Params, support: Any) -> Params:
    """Start the inner loop at the slow weights themselves: MAML's start, and the default.

    Frozen parameters (`nn.Parameter` with `requires_grad=False`) are left out: they do not adapt.

    Raises:
        ProblemError: if nothing is left to adapt.

    Example:
        >>> from_slow({"w": torch.ones(1)}, None)
        {'w': tensor([1.])}
    """
    fast = {k: v for k, v in slow.items() if not is_frozen(v)}
    if not fast:
        why = "every outer parameter is frozen" if slow else "outer={} holds no parameters"
        raise ProblemError(
            f"Nothing is left to adapt: {why}. Pass mf.trainable(model) as outer after "
            "requires_grad_(True) on what should adapt, or give Problem an init of your own."
        )
    return fast


@dataclass(frozen=True)
class Problem:
    """A bilevel problem: minimise `outer_loss(fast*(slow), slow, query)` over `slow`.

    `fast*(slow)` is what an inner solver makes of `inner_loss(., slow, support)`, started at
    `init(slow, support)`.

    Attributes:
        inner_loss: `(fast, slow, support) -> scalar`. If the support is a stream, it is given the
            data of its step.
        outer_loss: `(fast, slow, query) -> scalar`, or `(scalar, metrics)` with a dict of numbers
            or tensors, which come back detached in `Aux.metrics`.
        init: `(slow, support) -> fast` before the first step. Default: the slow weights
            themselves, so MAML is `Problem(loss, loss)`.
        prepare: `(slow, episode) -> episode`, computed once per outer step and shared by both
            levels: what does not depend on the fast weights.

    Raises:
        ProblemError: if a loss, `init` or `prepare` is not a function of that many arguments.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).mean()
        >>> maml = mf.Problem(loss, loss)
        >>> fresh = mf.Problem(loss, loss, init=lambda slow, support: {"w": torch.zeros(3)})
    """

    inner_loss: InnerLoss
    outer_loss: OuterLoss
    init: Callable[[Params, Any], Params] = from_slow
    prepare: Callable[[Params, Episode], Episode] | None = None

    def __post_init__(self) -> None:
        function("inner_loss", self.inner_loss, "(fast, slow, data) -> scalar", 3)
        function("outer_loss", self.outer_loss, "(fast, slow, data) -> scalar", 3)
        if self.prepare is not None:
            function("prepare", self.prepare, "(slow, episode) -> episode", 2)
        if not callable(self.init):
            raise ProblemError(f"init must be a function, got {type(self.init).__name__}.")
        # dict has no signature, and would copy the slow weights, as from_slow does.
        if self.init is dict or not takes(self.init, 2):
            raise ProblemError(
                "init must take two arguments, (slow, support) -> fast: write "
                "`init=lambda slow, support: ...`. For MAML leave init out."
            )

    def start(self, outer: Params, support: Any) -> Params:
        """Return `init(outer, support)`, checked to be a dict of floating-point tensors."""
        fast = self.init(outer, support)
        check_params(fast, "init", "fast weights")
        return fast

    def first(self, outer: Params, support: Any) -> Params:
        """Return the start as a constant, from a support that `prepare` has not seen yet."""
        outer, support = constants(outer), pt.detach(support)
        if support is not None:
            support = self.prepared(outer, Episode(support, support)).support
        return pt.detach(self.start(outer, support))

    def prepared(self, outer: Params, episode: Any) -> Episode:
        """Return the episode as `prepare` makes it."""
        episode = as_episode(episode)
        if self.prepare is None:
            return episode
        return as_episode(self.prepare(outer, episode), "prepare")

    def evaluate(self, fast: Params, outer: Params, query: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the outer loss and its metrics, detached."""
        value = self.outer_loss(fast, outer, query)
        if not isinstance(value, tuple):
            return scalar(value, "outer_loss"), {}
        if len(value) != 2 or not isinstance(value[1], dict):
            raise ProblemError(
                "outer_loss must return a scalar or (scalar, metrics) with a dict of metrics, got "
                f"a tuple of {[type(v).__name__ for v in value]}."
            )
        loss = scalar(value[0], "outer_loss")
        return loss, {k: _metric(k, v, loss) for k, v in value[1].items()}


def _metric(name: str, value: Any, loss: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, bool | int | float):
        return torch.tensor(value, device=loss.device)
    raise ProblemError(
        f"outer_loss returned the metric {name!r} of type {type(value).__name__}; metrics are "
        "numbers or tensors."
    )


def is_frozen(value: Tensor) -> bool:
    """Return whether a tensor is an `nn.Parameter` that does not require grad.

    Under transforms this checks the parameter itself, inside the wrappers.
    """
    value = innermost(value)
    # In this order: torch answers the other question in Python.
    return not value.requires_grad and isinstance(value, nn.Parameter)


def moving(outer: Params) -> Params:
    """Return the outer parameters that are not frozen."""
    return {k: v for k, v in outer.items() if not is_frozen(v)}


def constants(outer: Params) -> Params:
    """Return the outer parameters detached; frozen ones as they are, so that `init` knows them."""
    return {k: v if is_frozen(v) else v.detach() for k, v in outer.items()}


def trainable(module: nn.Module) -> Params:
    """Return the parameters of a module that require grad, by name: the usual `outer`.

    Tied parameters appear once, under their first name.

    Raises:
        ProblemError: if `module` is not a module, such as its parameters.

    Example:
        >>> sorted(trainable(nn.Linear(2, 1)))
        ['bias', 'weight']
    """
    if not isinstance(module, nn.Module):
        raise ProblemError(
            f"module must be a torch.nn.Module, got {type(module).__name__}: mf.trainable(net)."
        )
    return {k: v for k, v in module.named_parameters() if v.requires_grad}


def refuse_empty(outer: Params, who: Any, otherwise: str = "") -> None:
    """Raise for `outer={}`, where only explicit tensors are differentiated."""
    if not outer:
        raise ProblemError(
            f"outer={{}} with {who}, which differentiates explicit tensors only. Pass "
            "mf.trainable(model) as outer (never state_dict(): tied names clash)"
            + (f", {otherwise}." if otherwise else ".")
        )


@picklable
def proximal(inner_loss: InnerLoss, strength: float) -> InnerLoss:
    """Return `inner_loss + strength / 2 * |fast - slow|^2` (iMAML, arXiv 1909.04630).

    `slow` must hold every key of `fast`.

    Raises:
        ValueError: if `strength` is negative.
        ProblemError: if `inner_loss` is not a function; at the first call, if a fast weight has no
            counterpart in `slow`.

    Example:
        >>> loss = proximal(lambda fast, slow, _: (fast["w"] ** 2).sum(), strength=2.0)
        >>> w = {"w": torch.tensor([1.0])}
        >>> loss(w, {"w": torch.tensor([0.0])}, None)
        tensor(2.)
    """
    function("inner_loss", inner_loss, "(fast, slow, data) -> scalar")
    not_negative("strength", strength)

    def loss(fast: Params, slow: Params, support: Any) -> Tensor:
        missing = sorted(set(fast) - set(slow))
        if missing:
            raise ProblemError(
                f"proximal pulls every fast weight to the slow weight of the same name; slow has "
                f"no {missing[0]!r}. Return those names from init."
            )
        value = inner_loss(fast, slow, support)
        for k, v in fast.items():
            value = value + strength / 2 * ((v - slow[k]) ** 2).sum()
        return value

    return loss


def check_params(params: Any, source: str, noun: str) -> None:
    """Raise unless `params` is a dict from names to floating-point tensors."""
    if not isinstance(params, dict):
        raise ProblemError(
            f"{source} must be a dict of tensors ({noun} by name), got {type(params).__name__}."
            " From a module: mf.trainable(module)."
        )
    for name, value in params.items():
        if isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point():
            continue
        if not isinstance(name, str):
            raise ProblemError(
                f"{source} holds the key {name!r} of type {type(name).__name__}; names are texts."
            )
        if not isinstance(value, Tensor):
            raise ProblemError(
                f"{source} holds {name!r} of type {type(value).__name__}; {noun} are tensors."
            )
        if value.is_complex():
            raise ProblemError(
                f"{source} holds {name!r} of dtype {value.dtype}; {noun} are real. Hold "
                "torch.view_as_real(x), and write torch.view_as_complex(x) in the losses. Data may "
                "be complex."
            )
        raise ProblemError(
            f"{source} holds {name!r} of dtype {value.dtype}; only floating-point tensors can"
            " be differentiated. Close over integer tensors, or put them into the episode."
        )
