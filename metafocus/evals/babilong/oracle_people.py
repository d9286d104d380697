"""The solvers of tasks 6 to 14: they read the text and the question, not the simulator."""

from __future__ import annotations

import re

from metafocus.evals.babilong.facts import any_of, read
from metafocus.evals.babilong.lexicon import COUNTS, FRIENDS, LATER, PLACES, TIMES
from metafocus.evals.babilong.worlds import World


def at_place(context: str, question: str, world: World) -> str | None:
    """qa6 and qa9: the last sentence about the person decides."""
    match = re.fullmatch(r"Is (\w+) in the (\w+)\?", question)
    if not match:
        return None
    ways = any_of((*world.move, "is in", "is not in", "is no longer in"))
    found = re.findall(rf"(?<!\w){match[1]} ({ways}) the ({any_of(world.rooms)})\.", context)
    if not found:
        return None
    way, room = found[-1]
    if way in ("is not in", "is no longer in"):
        return "no" if room == match[2] else None
    return "yes" if room == match[2] else "no"


def perhaps_at(context: str, question: str, world: World) -> str | None:
    """qa10: also "either in the A or the B"."""
    match = re.fullmatch(r"Is (\w+) in the (\w+)\?", question)
    if not match:
        return None
    ways, places = any_of((*world.move, "is in", "is either in")), any_of(PLACES)
    found = re.findall(
        rf"(?<!\w){match[1]} (?:{ways}) the ({places})(?: or the ({places}))?\.", context
    )
    if not found:
        return None
    possible = [place for place in found[-1] if place]
    if match[2] not in possible:
        return "no"
    return "yes" if len(possible) == 1 else "maybe"


def held(context: str, world: World, person: str) -> list[str]:
    """Return what a person carries at the end, in the order of taking."""
    things: list[str] = []
    for fact in read(context, world):
        if fact.kind == "move":
            continue
        gets = fact.receiver == person if fact.kind == "give" else fact.actor == person
        if fact.what in things and fact.actor == person and fact.kind in ("drop", "give"):
            things.remove(fact.what)
        elif gets and fact.kind in ("get", "give"):
            things.append(fact.what)
    return things


def counted(context: str, question: str, world: World) -> str | None:
    """qa7."""
    match = re.fullmatch(r"How many objects is (\w+) carrying\?", question)
    return COUNTS[len(held(context, world, match[1]))] if match else None


def carried(context: str, question: str, world: World) -> str | None:
    """qa8."""
    match = re.fullmatch(r"What is (\w+) carrying\?", question)
    return (",".join(held(context, world, match[1])) or "nothing") if match else None


def moved(context: str, question: str, world: World) -> str | None:
    """qa11, qa12 and qa13: pronouns stand for the people of the sentence before."""
    match = re.fullmatch(r"Where is (\w+)\?", question)
    if not match:
        return None
    people, later = any_of(world.people), any_of(LATER)
    sentence = re.compile(
        rf"(?<!\w)(?:({people})(?: and ({people}))?|(?:{later}) (?:he|she|they)) "
        rf"(?:{any_of(world.move)}) the ({any_of(world.rooms)})\."
    )
    group: set[str] = set()
    room = None
    for first, second, where in sentence.findall(context):
        group = {first, second} if first else group
        room = where if match[1] in group else room
    return room


def earlier(context: str, question: str, world: World) -> str | None:
    """qa14: the sentences are put in the order of their times."""
    match = re.fullmatch(r"Where was (\w+) before the (\w+)\?", question)
    if not match:
        return None
    times = any_of((*TIMES, *(time.capitalize() for time in TIMES)))
    sentence = re.compile(
        rf"(?:({times}) )?(?<!\w)({any_of(FRIENDS)}) (?:{any_of(world.move)}) the "
        rf"({any_of(PLACES)})(?: ({times}))?\."
    )
    been = {
        (before or after).lower(): place
        for before, friend, place, after in sentence.findall(context)
        if friend == match[1]
    }
    order = [been[time] for time in TIMES if time in been]
    at = order.index(match[2]) if match[2] in order else 0
    return order[at - 1] if at else None
