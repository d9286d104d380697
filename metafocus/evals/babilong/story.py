"""A story with its question, and the sentence of an event."""

from __future__ import annotations

import random
from dataclasses import dataclass

from metafocus.evals.babilong.state import Event
from metafocus.evals.babilong.worlds import World


@dataclass(frozen=True)
class Story:
    """Facts in order, a question, and its answer in few words and as a sentence.

    `supports` has the numbers of the facts that the answer follows from.
    """

    facts: tuple[str, ...]
    question: str
    answer: str
    sentence: str
    supports: tuple[int, ...]


def event_text(event: Event, world: World, rng: random.Random) -> str:
    """Return an event as a fact, with a random verb."""
    verb = rng.choice(getattr(world, event.kind))
    if event.kind == "give":
        return f"{event.actor} {verb} the {event.what} to {event.receiver}."
    tail = rng.choice(world.tails) if event.kind != "move" else ""
    return f"{event.actor} {verb} the {event.what}{tail}."
