"""Names in command lines and configuration files, and the objects that they stand for.

Only here does a name stand for an object. In Python, objects are passed and need no name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metafocus import masks
from metafocus.autodiff.hvp import hvp_finite, hvp_forward
from metafocus.errors import ProblemError
from metafocus.estimators import Estimator, FirstOrder, Implicit, Unrolled
from metafocus.linear import CG
from metafocus.lm import all_tokens, answer_tokens, context_tokens

MASKS = {
    "causal": masks.causal,
    "prefix-lm": masks.prefix_lm,
    "context-bidirectional": masks.context_bidirectional,
    "full": masks.full,
}

ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "first-order": FirstOrder,
    "unrolled-last-1": lambda: Unrolled(last=1),
    "unrolled": Unrolled,
    "unrolled-recompute": lambda: Unrolled(recompute=True),
    "unrolled-forward": lambda: Unrolled(hvp=hvp_forward),
    "unrolled-finite": lambda: Unrolled(hvp=hvp_finite()),
    "implicit-cg": lambda: Implicit(CG(10)),
}

TOKENS = {"answer": answer_tokens, "context": context_tokens, "all": all_tokens}


def named(setting: str, name: Any, table: Mapping[str, Any]) -> Any:
    """Return the object with this name.

    Args:
        setting: what the name was given for, to appear in the error.
        name: the name.
        table: objects by name.

    Raises:
        ProblemError: for a name that is not in the table.

    Example:
        >>> named("mask", "diagonal", MASKS)
        Traceback (most recent call last):
        metafocus.errors.ProblemError: mask='diagonal' is unknown: use one of causal, prefix-lm, \
context-bidirectional, full.
    """
    if not isinstance(name, str) or name not in table:
        raise ProblemError(f"{setting}={name!r} is unknown: use one of {', '.join(table)}.")
    return table[name]
