"""Stories of tasks 6 to 14: where people are, what they carry, and who a pronoun means."""

from __future__ import annotations

import random
from collections.abc import Callable

from metafocus.evals.babilong.lexicon import COUNTS, FRIENDS, LATER, PLACES, PRONOUNS, TIMES
from metafocus.evals.babilong.state import State
from metafocus.evals.babilong.story import Story, event_text
from metafocus.evals.babilong.worlds import World

_MOST = 12  # facts of these tasks, at most


def yes_or_no(rng: random.Random, world: World) -> Story | None:
    """qa6: Is Mary in the kitchen?"""
    state = State(world, world.people, rng)
    for _ in range(2 * rng.randint(1, 5)):
        if state.act(("move", "move", "get", "drop")) is None:
            return None
    if not state.last_move:
        return None
    person = rng.choice(sorted(state.last_move))
    room, answer = _asked_place(rng, state.room[person], world.rooms)
    facts = tuple(event_text(event, world, rng) for event in state.events)
    asked = f"Is {person} in the {room}?"
    return Story(facts, asked, answer, answer, (state.last_move[person],))


def count(rng: random.Random, world: World) -> Story | None:
    """qa7: How many objects is Mary carrying?"""
    return _carried(
        rng,
        world,
        ("move", "get", "get", "give", "drop"),
        "How many objects is {} carrying?",
        lambda things: COUNTS[len(things)],
        len,
    )


def carried(rng: random.Random, world: World) -> Story | None:
    """qa8: What is Mary carrying? Several objects are joined by commas."""
    return _carried(
        rng,
        world,
        ("move", "get", "get", "drop"),
        "What is {} carrying?",
        lambda things: ",".join(things) or "nothing",
        tuple,
    )


def _carried(
    rng: random.Random,
    world: World,
    kinds: tuple[str, ...],
    question: str,
    answer: Callable[[list[str]], str],
    alike: Callable[[list[str]], object],
) -> Story | None:
    state = State(world, world.people, rng)
    for _ in range(rng.randint(2, 2 * _MOST)):
        state.act(kinds)
    about = {
        person: tuple(
            i
            for i, event in enumerate(state.events)
            if event.kind != "move" and person in (event.actor, event.receiver)
        )
        for person in world.people
    }
    held = {
        person: [thing for thing, holder in state.holder.items() if holder == person]
        for person, events in about.items()
        if events
    }
    if not held or max(map(len, held.values())) >= len(COUNTS):
        return None
    # Each answer with the same probability, as far as the story allows.
    wanted = rng.choice(sorted({alike(things) for things in held.values()}, key=str))
    person = rng.choice([p for p, things in held.items() if alike(things) == wanted])
    found = answer(held[person])
    facts = tuple(event_text(event, world, rng) for event in state.events)
    return Story(facts, question.format(person), found, found, about[person])


def negation(rng: random.Random, world: World) -> Story:
    """qa9: facts also say where a person is not."""
    known: dict[str, tuple[bool, str, int]] = {}
    facts: list[str] = []
    for _ in range(2 * rng.randint(1, 5)):
        person, room = rng.choice(world.people), rng.choice(world.rooms)
        inside = person in known and known[person][0]
        kind = rng.choice(("moved", "is", "not"))
        if kind == "not":
            if inside:
                room = known[person][1]
            facts.append(f"{person} is {'no longer' if inside else 'not'} in the {room}.")
        elif kind == "is":
            facts.append(f"{person} is in the {room}.")
        else:
            facts.append(f"{person} {rng.choice(world.move)} the {room}.")
        known[person] = (kind != "not", room, len(facts) - 1)
    person = rng.choice(sorted(known))
    inside, room, at = known[person]
    asked, answer = _asked_place(rng, room, world.rooms) if inside else (room, "no")
    return Story(tuple(facts), f"Is {person} in the {asked}?", answer, answer, (at,))


def indefinite(rng: random.Random, world: World) -> Story:
    """qa10: facts may leave open in which of two places a person is."""
    known: dict[str, tuple[tuple[str, ...], int]] = {}
    facts: list[str] = []
    for _ in range(2 * rng.randint(1, 5)):
        person = rng.choice(FRIENDS)
        places = tuple(rng.sample(PLACES, rng.choice((1, 1, 2))))
        if len(places) == 2:
            facts.append(f"{person} is either in the {places[0]} or the {places[1]}.")
        else:
            way = rng.choice(("is in", *world.move))
            facts.append(f"{person} {way} the {places[0]}.")
        known[person] = (places, len(facts) - 1)
    person = rng.choice(sorted(known))
    places, at = known[person]
    asked = rng.choice(places)
    answer = "yes" if len(places) == 1 else "maybe"
    if rng.random() < 1 / 3:
        asked, answer = rng.choice([p for p in PLACES if p not in places]), "no"
    return Story(tuple(facts), f"Is {person} in the {asked}?", answer, answer, (at,))


def moves(rng: random.Random, world: World, size: int, *, later: bool) -> Story:
    """qa11 to qa13: `size` people move together; if `later`, a second sentence has a pronoun."""
    last: dict[str, tuple[str, tuple[int, ...]]] = {}
    facts: list[str] = []
    for _ in range(rng.randint(1, _MOST // 2)):
        group = rng.sample(world.people, size)
        rooms = rng.sample(world.rooms, 2)
        why = (len(facts),)
        facts.append(f"{' and '.join(group)} {rng.choice(world.move)} the {rooms[0]}.")
        where = rooms[0]
        if later:
            word = "they" if size > 1 else PRONOUNS.get(group[0], "they")
            facts.append(f"{rng.choice(LATER)} {word} {rng.choice(world.move)} the {rooms[1]}.")
            why, where = (len(facts) - 2, len(facts) - 1), rooms[1]
        for person in group:
            last[person] = (where, why)
    person = rng.choice(sorted(last))
    room, why = last[person]
    return Story(tuple(facts), f"Where is {person}?", room, room, why)


def times(rng: random.Random, world: World) -> Story | None:
    """qa14: facts say when somebody was where, in any order."""
    been = {
        friend: dict(zip(TIMES, rng.sample(PLACES, len(TIMES)), strict=True)) for friend in FRIENDS
    }
    every = [(friend, time) for friend in FRIENDS for time in TIMES]
    told = rng.sample(every, rng.randint(3, _MOST))
    facts = []
    for friend, time in told:
        went = f"{friend} {rng.choice(world.move)} the {been[friend][time]}"
        facts.append(f"{time.capitalize()} {went}." if rng.random() < 0.5 else f"{went} {time}.")
    able = [f for f in FRIENDS if sum(friend == f for friend, _ in told) > 1]
    if not able:
        return None
    friend = rng.choice(able)
    known = [time for time in TIMES if (friend, time) in told]
    i = rng.randrange(1, len(known))
    before, after = (been[friend][time] for time in known[i - 1 : i + 1])
    why = tuple(sorted(told.index((friend, time)) for time in known[i - 1 : i + 1]))
    return Story(tuple(facts), f"Where was {friend} before the {after}?", before, before, why)


def _asked_place(rng: random.Random, right: str, places: tuple[str, ...]) -> tuple[str, str]:
    """Return a place to ask for, and the answer."""
    if rng.random() < 0.5:
        return right, "yes"
    return rng.choice([place for place in places if place != right]), "no"
