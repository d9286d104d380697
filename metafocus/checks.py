"""Checks of single arguments: every message names the argument, its value and what is allowed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from metafocus.errors import NonFiniteError, ProblemError


def is_number(value: Any) -> bool:
    """Return whether a value is an integer or a float; True and False are neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any, least: float = -math.inf) -> bool:
    """Return whether a value is an integer of at least `least`; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def whole(
    name: str, value: Any, least: int = 0, *, note: str = "", error: type[ValueError] = ValueError
) -> None:
    """Raise unless `value` is an integer of at least `least`; True and False are refused.

    Args:
        name: the name of the argument.
        value: its value.
        least: the smallest value that is allowed.
        note: what the message adds to the bound.
        error: what is raised.
    """
    if not is_whole(value, least):
        raise error(f"{name} must be an integer >= {least}{note}, got {value!r}.")


def number(name: str, value: Any, *, error: type[ValueError] = ValueError) -> None:
    """Raise unless `value` is a finite number; True and False are refused."""
    if not is_number(value) or not math.isfinite(value):
        raise error(f"{name} must be a finite number, got {value!r}.")


def real(name: str, value: Any, note: str = "", *, error: type[ValueError] = ValueError) -> None:
    """Raise unless `value` can be compared with a number: a number of Python, NumPy or torch."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise error(f"{name} must be a number{note}, got a tensor of shape {list(value.shape)}.")
    if not isinstance(value, Real | Tensor) or isinstance(value, bool):
        raise error(f"{name} must be a number{note}, got {value!r}.")


def positive(name: str, value: Any, *, error: type[ValueError] = ValueError) -> None:
    """Raise unless `value` is a number above zero and finite."""
    real(name, value, " > 0", error=error)
    if not value > 0 or math.isinf(value):
        raise error(f"{name} must be {'finite' if value > 0 else 'positive'}, got {value}.")


def not_negative(name: str, value: Any) -> None:
    """Raise unless `value` is a number of at least zero and finite."""
    real(name, value, " >= 0")
    if not value >= 0 or math.isinf(value):
        raise ValueError(f"{name} must be {'finite' if value > 0 else '>= 0'}, got {value}.")


def fraction(name: str, value: Any) -> None:
    """Raise unless `0 <= value < 1`."""
    real(name, value, " in [0, 1)")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")


def seeded(generator: Any) -> None:
    """Raise unless `generator` is a `torch.Generator`: randomness has an explicit source."""
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be a torch.Generator, got {type(generator).__name__}. Randomness is "
            "explicit: generator=torch.Generator().manual_seed(0)."
        )


def function(name: str, value: Any, form: str, count: int | None = None) -> None:
    """Raise unless `value` is a function of `count` arguments and no class.

    Args:
        name: the name of the argument.
        value: its value.
        form: what it takes and returns, and perhaps an example.
        count: how many arguments it is called with; None is not looked at, which takes no time.
    """
    if isinstance(value, type):
        got = f"the class {value.__name__}"
    elif not callable(value):
        got = repr(value) if isinstance(value, str) else type(value).__name__
    elif count is not None and not takes(value, count):
        got = f"{getattr(value, '__name__', type(value).__name__)}, which takes other arguments"
    else:
        return
    raise ProblemError(f"{name} must be a function {form}, got {got}.")


def takes(function: Callable[..., Any], count: int) -> bool:
    """Return whether a function can be called with `count` positional arguments."""
    function = function.forward if isinstance(function, nn.Module) else function
    try:
        # A wrapper may take other arguments than what it wraps.
        inspect.signature(function, follow_wrapped=False).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        # Some built-in functions do not say what they take.
        return True
    return True


def scalar(value: Any, name: str) -> Tensor:
    """Return `value` if it is a floating-point scalar tensor, else raise."""
    if not isinstance(value, Tensor):
        raise ProblemError(f"{name} must return a scalar tensor, got {type(value).__name__}.")
    if value.ndim != 0:
        raise ProblemError(
            f"{name} must return a scalar, got shape {list(value.shape)}. Reduce it: .mean()."
        )
    if not value.is_floating_point():
        raise ProblemError(f"{name} must return a floating-point scalar, got {value.dtype}.")
    return value


def check_finite(losses: Tensor) -> None:
    """Raise if an inner loss is NaN or infinite; one host synchronisation."""
    # One kernel where all is well: a finite sum has no other terms. A sum may overflow.
    if math.isfinite(losses.sum().item()):
        return
    finite = torch.isfinite(losses)
    if not finite.all():
        where = (~finite).nonzero()[0].tolist()
        value = losses[tuple(where)].item()
        place = f"step {where[-1]}" if len(where) == 1 else f"task {where[0]}, step {where[-1]}"
        raise NonFiniteError(
            f"inner_loss is {value} before inner {place}. Lower the solver's lr, clip its "
            "gradients (clip=mf.clip_global(1.0)), or look at the support data."
        )
