"""The state of a world, the actions that change it, and what follows from the text so far."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from metafocus.evals.babilong.worlds import World

_TRIES = 100


@dataclass(frozen=True)
class Event:
    """One action; `what` is the room of a move, or the object of any other action."""

    kind: str
    actor: str
    what: str
    receiver: str = ""


class State:
    """The state of a world; `history` has the known rooms of each object, with their supports."""

    def __init__(self, world: World, people: tuple[str, ...], rng: random.Random):
        self.world: World = world
        self.people: tuple[str, ...] = people
        self.rng: random.Random = rng
        self.room: dict[str, str] = {person: rng.choice(world.rooms) for person in people}
        self.floor: dict[str, str] = {thing: rng.choice(world.rooms) for thing in world.objects}
        self.holder: dict[str, str] = {}
        self.events: list[Event] = []
        self.last_move: dict[str, int] = {}
        self.history: dict[str, list[tuple[str, tuple[int, ...]]]] = {o: [] for o in world.objects}
        # For each object its last event, and the last move of the person who dropped it there.
        self._event: dict[str, int] = {}
        self._dropped_at: dict[str, int | None] = {}

    def act(
        self, kinds: tuple[str, ...], allowed: Callable[[Event], bool] = lambda event: True
    ) -> Event | None:
        """Do a random possible action and return it, or None if 100 draws found none."""
        for _ in range(_TRIES):
            event = self._draw(self.rng.choice(kinds))
            if self._possible(event) and allowed(event):
                self._do(event)
                return event
        return None

    def place(self, thing: str) -> str:
        """Return the room that an object is in."""
        return self.room[self.holder[thing]] if thing in self.holder else self.floor[thing]

    def supports(self, thing: str) -> tuple[int, ...]:
        """Return the last event of an object and the move that gives its room, or nothing."""
        if thing not in self._event:
            return ()
        if thing in self.holder:
            move = self.last_move.get(self.holder[thing])
        else:
            move = self._dropped_at[thing]
        return () if move is None else tuple(sorted((self._event[thing], move)))

    def _draw(self, kind: str) -> Event:
        actor = self.rng.choice(self.people)
        what = self.rng.choice(self.world.rooms if kind == "move" else self.world.objects)
        return Event(kind, actor, what, self.rng.choice(self.people) if kind == "give" else "")

    def _possible(self, event: Event) -> bool:
        here = self.room[event.actor]
        if event.kind == "move":
            return here != event.what
        if event.kind == "get":
            return event.what not in self.holder and self.floor[event.what] == here
        holds = self.holder.get(event.what) == event.actor
        if event.kind == "drop":
            return holds
        return holds and event.receiver != event.actor and self.room[event.receiver] == here

    def _do(self, event: Event) -> None:
        at = len(self.events)
        self.events.append(event)
        if event.kind == "move":
            self.room[event.actor] = event.what
            self.last_move[event.actor] = at
        else:
            self._event[event.what] = at
        if event.kind == "get":
            self.holder[event.what] = event.actor
        elif event.kind == "give":
            self.holder[event.what] = event.receiver
        elif event.kind == "drop":
            del self.holder[event.what]
            self.floor[event.what] = self.room[event.actor]
            self._dropped_at[event.what] = self.last_move.get(event.actor)
        self._remember()

    def _remember(self) -> None:
        for thing, past in self.history.items():
            why = self.supports(thing)
            if not why:
                continue
            room = self.place(thing)
            if past and past[-1][0] == room:
                past.pop()  # the same stay, with newer supports
            past.append((room, why))
