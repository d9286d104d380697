"""Makes stories of people who move between rooms and carry objects, with a question each.

The rules are those of bAbI's tasks, in a new implementation; tasks 6 to 20 are in `people` and
`logic`. An action happens only if it
changes the world. Kinds and arguments are drawn uniformly until an action is possible, at most 100
times. The first places of people and objects are part of the world but not of the text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from metafocus.errors import DataError
from metafocus.evals.babilong import logic, people
from metafocus.evals.babilong.state import State
from metafocus.evals.babilong.story import Story, event_text
from metafocus.evals.babilong.worlds import AXES, MOST_FACTS, World

_STORIES = 2000  # the largest number of attempts
_QUESTIONS = 5  # the largest number of questions in a story; a sample ends at one of them


_Asked = tuple[str, str, str, tuple[int, ...]]


def tell(task: str, rng: random.Random, world: World) -> Story:
    """Return a random story of a task.

    Raises:
        DataError: if the tables of the world allow no such story.
    """
    for _ in range(_STORIES):
        found = _MAKERS[task](rng, world)
        if found is not None and len(found.facts) <= MOST_FACTS[task]:
            return found
    raise DataError(
        f"world: no {task} story in {_STORIES} attempts; give it fewer rooms or more people"
    )


def _moves(rng: random.Random, world: World) -> Story | None:
    state = State(world, world.people, rng)
    for _ in range(2 * rng.randint(1, _QUESTIONS)):
        if state.act(("move",)) is None:
            return None
    person = rng.choice(sorted(state.last_move))
    room = state.room[person]
    asked = (f"Where is {person}?", room, f"{person} is in the {room}.")
    return _story(state, (*asked, (state.last_move[person],)))


def _dynamics(rng: random.Random, world: World, ask, task: str) -> Story | None:
    """Get, drop and move; after more than two facts ask a question with probability 1/2."""
    state = State(world, world.people, rng)
    wanted, since, asked = rng.randint(1, _QUESTIONS), 0, None
    while wanted and len(state.events) < MOST_FACTS[task]:
        if state.act(("get", "drop", "move")) is None:
            return None
        since += 1
        asked = ask(state, rng) if since > 2 and rng.random() < 0.5 else None
        if asked is not None:
            wanted, since = wanted - 1, 0
    return None if wanted or asked is None else _story(state, asked)


def _ask_where(state: State, rng: random.Random) -> _Asked | None:
    known = [thing for thing in state.world.objects if state.supports(thing)]
    if not known:
        return None
    thing = rng.choice(known)
    room = state.place(thing)
    return f"Where is the {thing}?", room, f"The {thing} is in the {room}.", state.supports(thing)


def _ask_before(state: State, rng: random.Random) -> _Asked | None:
    """Ask only for a room that the object has entered once, so that there is one answer."""
    options = []
    for thing, past in state.history.items():
        rooms = [room for room, _ in past]
        options += [(thing, i) for i in range(1, len(past)) if rooms.count(rooms[i]) == 1]
    if not options:
        return None
    thing, i = rng.choice(options)
    (before, why), (room, then) = state.history[thing][i - 1 : i + 1]
    return (
        f"Where was the {thing} before the {room}?",
        before,
        f"Before the {room} the {thing} was in the {before}.",
        tuple(sorted({*why, *then})),
    )


def _line(rng: random.Random, world: World) -> Story:
    """Make three rooms on a line; only the middle one has a neighbour on either side."""
    first, middle, last = rng.sample(world.rooms, 3)
    toward, away = rng.choice(AXES)
    pairs = rng.sample([(first, middle), (middle, last)], 2)
    facts = tuple(
        f"The {a} is {toward} of the {b}."
        if rng.random() < 0.5
        else f"The {b} is {away} of the {a}."
        for a, b in pairs
    )
    answer, side, other = rng.choice([(first, toward, away), (last, away, toward)])
    question = (
        f"What is {side} of the {middle}?"
        if rng.random() < 0.5
        else f"What is the {middle} {other} of?"
    )
    support = next(i for i, pair in enumerate(pairs) if answer in pair)
    return Story(facts, question, answer, answer, (support,))


def _gifts(rng: random.Random, world: World) -> Story | None:
    """Get, give and move; after a gift come up to five facts that keep its answer unique."""
    state = State(world, world.givers, rng)
    kinds, gift, at = ("get", "give", "move"), None, 0
    for _ in range(rng.randint(1, _QUESTIONS)):
        gift = state.act(kinds)
        while gift is not None and gift.kind != "give":
            gift = state.act(kinds) if len(state.events) < MOST_FACTS["qa5"] else None
        if gift is None:
            return None
        at = len(state.events) - 1
        pair = {gift.actor, gift.receiver}
        for _ in range(rng.randint(0, 5)):
            state.act(
                kinds,
                lambda e, thing=gift.what, pair=pair: (
                    e.kind != "give" or (e.what != thing and {e.actor, e.receiver} != pair)
                ),
            )
    assert gift is not None
    giver, thing, receiver = gift.actor, gift.what, gift.receiver
    question, answer = rng.choice(
        [
            (f"Who gave the {thing} to {receiver}?", giver),
            (f"Who gave the {thing}?", giver),
            (f"What did {giver} give to {receiver}?", thing),
            (f"Who did {giver} give the {thing} to?", receiver),
            (f"Who received the {thing}?", receiver),
        ]
    )
    return _story(state, (question, answer, answer, (at,)))


def _story(state: State, asked: _Asked) -> Story:
    facts = tuple(event_text(event, state.world, state.rng) for event in state.events)
    return Story(facts, *asked)


_MAKERS: dict[str, Callable[[random.Random, World], Story | None]] = {
    "qa1": _moves,
    "qa2": partial(_dynamics, ask=_ask_where, task="qa2"),
    "qa3": partial(_dynamics, ask=_ask_before, task="qa3"),
    "qa4": _line,
    "qa5": _gifts,
    "qa6": people.yes_or_no,
    "qa7": people.count,
    "qa8": people.carried,
    "qa9": people.negation,
    "qa10": people.indefinite,
    "qa11": partial(people.moves, size=1, later=True),
    "qa12": partial(people.moves, size=2, later=False),
    "qa13": partial(people.moves, size=2, later=True),
    "qa14": people.times,
    "qa15": logic.afraid,
    "qa16": logic.color,
    "qa17": logic.positions,
    "qa18": logic.sizes,
    "qa19": logic.path,
    "qa20": logic.motives,
}
