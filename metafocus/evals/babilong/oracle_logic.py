"""The solvers of tasks 15 to 20: they read the text and the question, not the simulator."""

from __future__ import annotations

import re
from collections import deque

from metafocus.evals.babilong.facts import any_of
from metafocus.evals.babilong.lexicon import (
    ANIMALS,
    COLORS,
    KINDS,
    MOTIVES,
    PETS,
    PLAYERS,
    RELATIONS,
    SHAPES,
    SPECIES,
    STEPS,
    THINGS,
)
from metafocus.evals.babilong.worlds import World


def fear(context: str, question: str, world: World) -> str | None:
    """qa15: the kind of the animal, and what this kind is afraid of."""
    match = re.fullmatch(r"What is (\w+) afraid of\?", question)
    if not match:
        return None
    singular = {plural.lower(): kind for kind, plural in SPECIES.items()}
    plurals = any_of(tuple(singular))
    kinds = dict(re.findall(rf"\b({any_of(PETS)}) is a ({any_of(tuple(SPECIES))})\.", context))
    fears = re.findall(rf"\b({plurals}) are afraid of ({plurals})\.", context, re.IGNORECASE)
    table = {singular[a.lower()]: singular[b.lower()] for a, b in fears}
    return table.get(kinds.get(match[1].capitalize(), ""))


def shade(context: str, question: str, world: World) -> str | None:
    """qa16: the color of another animal of the same kind."""
    match = re.fullmatch(r"What color is (\w+)\?", question)
    if not match:
        return None
    kinds = dict(re.findall(rf"\b({any_of(ANIMALS)}) is a ({any_of(KINDS)})\.", context))
    colors = dict(re.findall(rf"\b({any_of(ANIMALS)}) is ({any_of(COLORS)})\.", context))
    found = {colors[name] for name, kind in kinds.items() if name in colors and
             kind == kinds.get(match[1])}  # fmt: skip
    return found.pop() if len(found) == 1 else None


def beside(context: str, question: str, world: World) -> str | None:
    """qa17: places relative to the first shape, spread from sentence to sentence."""
    shapes, words = any_of(SHAPES), any_of(tuple(RELATIONS))
    match = re.fullmatch(rf"Is the ({shapes}) ({words}) the ({shapes})\?", question)
    if not match:
        return None
    found = re.findall(rf"The ({shapes}) is ({words}) the ({shapes})\.", context)
    places = {found[0][2]: (0, 0)} if found else {}
    for _ in found:
        for a, word, b in found:
            x, y = RELATIONS[word]
            if b in places and a not in places:
                places[a] = (places[b][0] + x, places[b][1] + y)
            if a in places and b not in places:
                places[b] = (places[a][0] - x, places[a][1] - y)
    if match[1] not in places or match[3] not in places:
        return None
    (ax, ay), (bx, by) = places[match[1]], places[match[3]]
    judged = {
        "to the left of": ax < bx,
        "to the right of": ax > bx,
        "above": ay > by,
        "below": ay < by,
    }
    return "yes" if judged[match[2]] else "no"


def larger(context: str, question: str, world: World) -> str | None:
    """qa18: what can be reached from a thing by "is bigger than"."""
    things = any_of(THINGS)
    fits = re.findall(rf"The ({things}) fits inside the ({things})\.", context)
    bigger = re.findall(rf"The ({things}) is bigger than the ({things})\.", context)
    above: dict[str, set[str]] = {}
    for small, large in [*fits, *((b, a) for a, b in bigger)]:
        above.setdefault(small, set()).add(large)
    if match := re.fullmatch(rf"Does the ({things}) fit in the ({things})\?", question):
        small, large = match[1], match[2]
    elif match := re.fullmatch(rf"Is the ({things}) bigger than the ({things})\?", question):
        small, large = match[2], match[1]
    else:
        return None
    if large in _reached(above, small):
        return "yes"
    return "no" if small in _reached(above, large) else None


def _reached(above: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        more = above.get(waiting.pop(), set()) - found
        found |= more
        waiting += more
    return found


def walk(context: str, question: str, world: World) -> str | None:
    """qa19: the shortest way between two rooms."""
    rooms = any_of(world.rooms)
    match = re.fullmatch(rf"How do you go from the ({rooms}) to the ({rooms})\?", question)
    if not match:
        return None
    back = {"east": "w", "west": "e", "north": "s", "south": "n"}
    doors: dict[str, list[tuple[str, str]]] = {}
    sides = any_of(tuple(STEPS))
    for a, side, b in re.findall(rf"The ({rooms}) is ({sides}) of the ({rooms})\.", context):
        doors.setdefault(b, []).append((side[0], a))
        doors.setdefault(a, []).append((back[side], b))
    start: tuple[str, tuple[str, ...]] = (match[1], ())
    waiting: deque[tuple[str, tuple[str, ...]]] = deque([start])
    seen = {match[1]}
    while waiting:
        room, steps = waiting.popleft()
        if room == match[2]:
            return ",".join(steps)
        for step, other in doors.get(room, []):
            if other not in seen:
                seen.add(other)
                waiting.append((other, (*steps, step)))
    return None


def motive(context: str, question: str, world: World) -> str | None:
    """qa20: the last state that is told of the player."""
    match = re.fullmatch(r"(Where will|Why did) (\w+) (?:go|go to the \w+|get the \w+)\?", question)
    if not match or match[2].capitalize() not in PLAYERS:
        return None
    states = re.findall(rf"\b{match[2].capitalize()} is ({any_of(tuple(MOTIVES))})\.", context)
    if not states:
        return None
    return MOTIVES[states[-1]][0] if match[1] == "Where will" else states[-1]
