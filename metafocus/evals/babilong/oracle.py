"""An independent solver, which reads the context and the question and does not use the simulator.

It finds the fact sentences in a text by the tables of the world, and reasons backwards from the
question. The simulator goes forward through a hidden state.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from metafocus.errors import DataError
from metafocus.evals.babilong import oracle_logic, oracle_people
from metafocus.evals.babilong.facts import Fact, any_of, read
from metafocus.evals.babilong.worlds import AXES, World


def solve(task: str, context: str, question: str, world: World | None = None) -> str:
    """Derive the answer of a question from the text alone.

    Raises:
        DataError: if the text does not determine the answer, or if the question has an unknown
            form.

    Example:
        >>> from metafocus.evals.babilong import solve
        >>> solve("qa2", "Mary got the milk. It rained. Mary moved to the office.",
        ...       "Where is the milk?")
        'office'
    """
    world = World() if world is None else world
    if task in _OF_FACTS:
        found = _OF_FACTS[task](read(context, world), question)
    else:
        found = _OF_TEXT[task](context, question, world)
    if found is None:
        raise DataError(f"question={question!r}: the context does not determine its answer")
    return found


def _last_room(facts: list[Fact], person: str) -> str | None:
    moves = (f.what for f in reversed(facts) if f.kind == "move" and f.actor == person)
    return next(moves, None)


def _room_of(facts: list[Fact], thing: str) -> str | None:
    for i in range(len(facts) - 1, -1, -1):
        fact = facts[i]
        if fact.what == thing:
            # The person who dropped it may have moved on; a person who holds it carries it.
            return _last_room(facts[:i] if fact.kind == "drop" else facts, fact.actor)
    return None


def _person(facts: list[Fact], question: str) -> str | None:
    match = re.fullmatch(r"Where is (\w+)\?", question)
    return match and _last_room(facts, match[1])


def _thing(facts: list[Fact], question: str) -> str | None:
    match = re.fullmatch(r"Where is the (\w+)\?", question)
    return match and _room_of(facts, match[1])


def _before(facts: list[Fact], question: str) -> str | None:
    match = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question)
    if not match:
        return None
    stays: list[str] = []
    for end in range(1, len(facts) + 1):
        room = _room_of(facts[:end], match[1])
        if room and stays[-1:] != [room]:
            stays.append(room)
    # With two visits to the room there are two answers.
    at = [i for i, room in enumerate(stays) if room == match[2]]
    return stays[at[0] - 1] if len(at) == 1 and at[0] else None


def _beside(context: str, question: str, world: World) -> str | None:
    rooms, opposite = any_of(world.rooms), {a: b for x, y in AXES for a, b in ((x, y), (y, x))}
    sides = any_of(tuple(opposite))
    neighbours: dict[tuple[str, str], list[str]] = {}
    for a, side, b in re.findall(rf"The ({rooms}) is ({sides}) of the ({rooms})\.", context):
        neighbours.setdefault((side, b), []).append(a)
        neighbours.setdefault((opposite[side], a), []).append(b)
    match = re.fullmatch(rf"What is ({sides}) of the (\w+)\?", question)
    key = (match[1], match[2]) if match else None
    if match := re.fullmatch(rf"What is the (\w+) ({sides}) of\?", question):
        key = (opposite[match[2]], match[1])
    found = neighbours.get(key, []) if key else []
    return found[0] if len(found) == 1 else None


_GIFTS = {  # what a question gives, and what it asks for
    r"Who gave the (?P<what>\w+) to (?P<receiver>\w+)\?": "actor",
    r"Who gave the (?P<what>\w+)\?": "actor",
    r"What did (?P<actor>\w+) give to (?P<receiver>\w+)\?": "what",
    r"Who did (?P<actor>\w+) give the (?P<what>\w+) to\?": "receiver",
    r"Who received the (?P<what>\w+)\?": "receiver",
}


def _gift(facts: list[Fact], question: str) -> str | None:
    for pattern, wanted in _GIFTS.items():
        match = re.fullmatch(pattern, question)
        if match:
            for fact in reversed(facts):
                given = fact._asdict()
                if fact.kind == "give" and all(given[k] == v for k, v in match.groupdict().items()):
                    return given[wanted]
    return None


_OF_FACTS: dict[str, Callable[[list[Fact], str], str | None]] = {
    "qa1": _person,
    "qa2": _thing,
    "qa3": _before,
    "qa5": _gift,
}
_OF_TEXT: dict[str, Callable[[str, str, World], str | None]] = {
    "qa4": _beside,
    "qa6": oracle_people.at_place,
    "qa7": oracle_people.counted,
    "qa8": oracle_people.carried,
    "qa9": oracle_people.at_place,
    "qa10": oracle_people.perhaps_at,
    "qa11": oracle_people.moved,
    "qa12": oracle_people.moved,
    "qa13": oracle_people.moved,
    "qa14": oracle_people.earlier,
    "qa15": oracle_logic.fear,
    "qa16": oracle_logic.shade,
    "qa17": oracle_logic.beside,
    "qa18": oracle_logic.larger,
    "qa19": oracle_logic.walk,
    "qa20": oracle_logic.motive,
}
