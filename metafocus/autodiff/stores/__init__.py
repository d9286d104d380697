"""Where the states of a long inner loop live until the backward pass needs them.

`Unrolled(store=...)` takes one of these. The hypergradient is the same, to the last bit, under all
of them; they differ in the states kept and in the steps taken again (`.cost(steps)`).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from metafocus.autodiff.stores.on_disk import Disk
from metafocus.autodiff.stores.places import Device, Host, Place
from metafocus.autodiff.stores.plans import (
    Binomial,
    Cost,
    Every,
    Plan,
    Segments,
    Tree,
    cost_of,
)
from metafocus.checks import whole
from metafocus.errors import ProblemError

__all__ = ["Cost", "Store", "cpu", "device", "disk", "schedule", "segments", "tree"]


@dataclass(frozen=True)
class Store:
    """Which states are kept, and where. Made by the functions of this module.

    Attributes:
        plan: which states are kept.
        place: where they live.
    """

    plan: Plan | None
    place: Place

    def plan_for(self, steps: int) -> Plan:
        """Return which of the states of a loop of `steps` steps are kept."""
        # The plan of segments whose length depends on the number of steps.
        return Segments(max(math.isqrt(steps), 1)) if self.plan is None else self.plan

    def cost(self, steps: int) -> Cost:
        """Return the steps taken again and the states kept for a loop of `steps` steps.

        Example:
            >>> schedule(12).cost(3000)
            Cost(extra=9625, states=12)
            >>> device().cost(3000)
            Cost(extra=0, states=3000)
        """
        return cost_of(self.plan_for(steps), steps)


def device() -> Store:
    """Keep the state before every step where it is; what `recompute=True` does.

    Example:
        >>> device().cost(100)
        Cost(extra=0, states=100)
    """
    return Store(Every(), Device())


def cpu() -> Store:
    """Keep the state before every step in the memory of the host.

    On a CUDA device the memory is pinned, and no copy makes the host wait.

    Example:
        >>> cpu().cost(100)
        Cost(extra=0, states=100)
    """
    return Store(Every(), Host())


def disk(directory: str | os.PathLike[str]) -> Store:
    """Keep the state before every step in files below a directory, which is created.

    A run writes to a new directory below it, and removes that directory when the backward pass is
    over, when its graph is freed, or when the process ends. After a process was killed, the next
    run to use the store removes what is left. Nothing else in the directory is touched.

    Args:
        directory: on a file system with file locks, and with room for the states.

    Raises:
        ProblemError: if `directory` is not a path.
        DataError: at the call, if the directory is full or cannot be written.

    Example:
        >>> disk("/tmp/states").cost(100)
        Cost(extra=0, states=100)
    """
    if not isinstance(directory, str | os.PathLike):
        raise ProblemError(f"directory must be a path, got {type(directory).__name__}.")
    return Store(Every(), Disk(os.fspath(directory)))


def segments(k: int | None = None, on: Store | None = None) -> Store:
    """Keep the state before every `k`-th step; inside the segment at hand, every state.

    About `K / k + k` states for one more pass over the `K` steps.

    Args:
        k: steps in a segment; None: the square root of the number of steps.
        on: `cpu()` or `disk(directory)`; None: the device.

    Example:
        >>> segments().cost(100)
        Cost(extra=81, states=19)
    """
    if k is not None:
        whole("k", k, 1)
    return Store(None if k is None else Segments(k), _place("segments", on))


def schedule(slots: int, on: Store | None = None) -> Store:
    """Keep `slots` states for any number of steps, with the fewest steps taken again.

    With `s` slots, `comb(s + r, r)` steps are taken again at most `r` times each.

    Args:
        slots: how many states are kept, the first one included.
        on: `cpu()` or `disk(directory)`; None: the device.

    Example:
        >>> schedule(5).cost(100)
        Cost(extra=220, states=5)

    References:
        Griewank and Walther, Algorithm 799: Revolve, ACM TOMS 26 (2000).
    """
    whole("slots", slots, 1)
    return Store(Binomial(slots), _place("schedule", on))


def tree(k: int, on: Store | None = None) -> Store:
    """Keep the states along one path of a `k`-ary tree over the steps.

    About `(k - 1) log_k(K)` states, and each step is taken again at most `log_k(K)` times.

    Args:
        k: parts that a part is divided into, at least 2.
        on: `cpu()` or `disk(directory)`; None: the device.

    Example:
        >>> tree(2).cost(100)
        Cost(extra=273, states=6)

    References:
        Engstrom et al., Optimizing ML Training with Metagradient Descent, arXiv 2503.13751.
    """
    whole("k", k, 2)
    return Store(Tree(k), _place("tree", on))


def _place(name: str, on: Store | None) -> Place:
    if on is None:
        return Device()
    if not isinstance(on, Store) or not isinstance(on.plan, Every):
        raise ProblemError(
            f"on must be mf.stores.cpu(), mf.stores.disk(directory) or None, got {on!r}: "
            f"{name} decides which states are kept, and `on` says only where."
        )
    return on.place
