"""Which states of a long run are kept, so that the others can be computed again.

A plan answers one question: the state before step `begin` is at hand, the steps up to `end` are to
be differentiated, and `free` more states may be kept; before which step shall the next one be kept?
The same answers serve the forward pass, the backward pass and the prediction of the cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Plan(Protocol):
    """Which states are kept."""

    @property
    def slots(self) -> float:
        """How many states are kept at most, the first one included; `math.inf`: no limit."""
        ...

    def next(self, begin: int, end: int, free: float) -> int:
        """Return the step before which to keep the next state, `begin < step < end`."""
        ...


class Cost(NamedTuple):
    """What a plan costs.

    Attributes:
        extra: inner steps that the backward pass takes again without a graph. (Each step is taken
            once more with a graph, under every plan.)
        states: the largest number of states kept at one time, the first one included.
    """

    extra: int
    states: int


@dataclass(frozen=True)
class Every:
    """Keep the state before every step."""

    slots: float = math.inf

    def next(self, begin: int, end: int, free: float) -> int:
        """Return the next step."""
        return begin + 1


@dataclass(frozen=True)
class Segments:
    """Keep the state before every `size`-th step; inside the segment at hand, every state."""

    size: int
    slots: float = math.inf

    def next(self, begin: int, end: int, free: float) -> int:
        """Return the start of the next segment, or the next step of the last one."""
        start = begin + self.size - begin % self.size
        return start if start < end else begin + 1


@dataclass(frozen=True)
class Binomial:
    """Keep `slots` states so that the fewest steps are taken again (Revolve)."""

    slots: float

    def next(self, begin: int, end: int, free: float) -> int:
        """Return the largest step of an optimal division."""
        steps, states = end - begin, int(min(free, end - begin)) + 1
        if states >= steps:
            return begin + 1
        # With `states` states, up to comb(states + r, r) steps are taken at most r times each.
        repeats = 0
        while math.comb(states + repeats, states) < steps:
            repeats += 1
        within = math.comb(states + repeats - 1, states)
        after = math.comb(states + repeats - 2, states - 1)
        return begin + min(within, steps - after, steps - 1)


@dataclass(frozen=True)
class Tree:
    """Divide the steps into `k` parts, and each part again when its turn comes (REPLAY)."""

    k: int
    slots: float = math.inf

    def next(self, begin: int, end: int, free: float) -> int:
        """Return the start of the next part: parts have a power of `k` steps."""
        size = 1
        while size * self.k < end - begin:
            size *= self.k
        return begin + size


def kept_ahead(plan: Plan, begin: int, end: int, held: int) -> Iterator[int]:
    """Yield the steps before which states are kept on the way from `begin` to `end`.

    Args:
        plan: which states are kept.
        begin: the state before this step is held.
        end: one more than the last step to differentiate.
        held: how many states are held already.
    """
    while end - begin > 1 and held < plan.slots:
        begin = plan.next(begin, end, plan.slots - held)
        held += 1
        yield begin


class Turn(NamedTuple):
    """One step of the backward pass.

    Attributes:
        begin: the step of the kept state to continue from.
        keep: the steps on the way before which states are kept.
        step: the step to differentiate.
        held: the steps of the states that are held meanwhile.
        done: whether the state at `begin` is not needed any more.
    """

    begin: int
    keep: list[int]
    step: int
    held: int
    done: bool


def turns(plan: Plan, steps: int) -> Iterator[Turn]:
    """Yield what the backward pass does, from the last step to the first."""
    held = [0, *kept_ahead(plan, 0, steps, 1)]
    for step in reversed(range(steps)):
        begin = held[-1]
        # The state before `step` itself is at hand when it is reached.
        keep = [at for at in kept_ahead(plan, begin, step + 1, len(held)) if at < step]
        held += keep
        yield Turn(begin, keep, step, len(held), begin == step)
        if begin == step:
            held.pop()


def cost_of(plan: Plan, steps: int) -> Cost:
    """Return what a plan costs for some number of steps."""
    extra, states = 0, min(steps, 1)
    for turn in turns(plan, steps):
        extra += turn.step - turn.begin
        states = max(states, turn.held)
    return Cost(extra, states)
