"""Notice a meta loss that is built anew at every step: its checks then run at every step, too."""

from __future__ import annotations

import warnings
from typing import Any

from metafocus.errors import RebuiltWarning

LIMIT = 8
"""After so many meta losses that are built alike and evaluated once each comes the warning."""

_ONCE: dict[int, int] = {}
"""By kind: how many were evaluated once, since one was evaluated again."""


class Uses:
    """The evaluations of one meta loss.

    Args:
        parts: what it is built of. Functions count by their code, so that a `def` or a `lambda` in
            the body of a loop is the same one each time; other objects by their hash.
    """

    def __init__(self, *parts: Any):
        self.kind: int = hash(tuple(_kind(part) for part in parts))
        self.count: int = 0

    def add(self) -> None:
        """Count one more evaluation.

        Warns:
            RebuiltWarning: once for each kind, at the first evaluation of the last of `LIMIT`.
        """
        self.count += 1
        if self.count > 1:
            if self.count == 2:
                _ONCE.pop(self.kind, None)
            return
        _ONCE[self.kind] = _ONCE.get(self.kind, 0) + 1
        if _ONCE[self.kind] == LIMIT:
            warnings.warn(
                f"bilevel was called {LIMIT} times with the same losses, solver and estimator, and "
                "each meta loss was evaluated only once. The first evaluation checks the problem, "
                "which costs several evaluations of the inner loss. Build the meta loss before the "
                "loop, call it in the loop, and pass what differs in outer or in the episode.",
                RebuiltWarning,
                stacklevel=2,
            )


def _kind(part: Any) -> int:
    code = getattr(part, "__code__", None)
    if code is not None:
        return hash(code)
    try:
        return hash((type(part), part))
    except TypeError:
        # A solver with a list, or an unhashable class of the user's.
        return hash(type(part))
