"""Stories of tasks 15 to 20: deduction, induction, positions, sizes, paths and motives."""

from __future__ import annotations

import random

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
from metafocus.evals.babilong.story import Story
from metafocus.evals.babilong.worlds import World


def afraid(rng: random.Random, world: World) -> Story:
    """qa15: What is Gertrude afraid of?"""
    fears = {one: rng.choice([other for other in SPECIES if other != one]) for one in SPECIES}
    pets = {pet: rng.choice(tuple(SPECIES)) for pet in PETS}
    facts = [f"{SPECIES[a]} are afraid of {SPECIES[b].lower()}." for a, b in fears.items()]
    facts += [f"{pet} is a {kind}." for pet, kind in pets.items()]
    pet = rng.choice(PETS)
    why = (tuple(fears).index(pets[pet]), len(fears) + PETS.index(pet))
    return _shuffled(rng, facts, f"What is {pet.lower()} afraid of?", fears[pets[pet]], why)


def color(rng: random.Random, world: World) -> Story:
    """qa16: What color is Greg? As other animals of his kind, so kinds have one color each."""
    colors = {kind: rng.choice(COLORS) for kind in KINDS}
    asked, other, *rest = rng.sample(ANIMALS, len(ANIMALS))
    kinds = {name: rng.choice(KINDS) for name in (asked, *rest)}
    kinds[other] = kinds[asked]
    told = [name for name in ANIMALS if name != asked]
    facts = [f"{name} is a {kinds[name]}." for name in ANIMALS]
    facts += [f"{name} is {colors[kinds[name]]}." for name in told]
    why = (ANIMALS.index(asked), ANIMALS.index(other), len(ANIMALS) + told.index(other))
    return _shuffled(rng, facts, f"What color is {asked}?", colors[kinds[asked]], why)


def positions(rng: random.Random, world: World) -> Story:
    """qa17: Is the pink rectangle to the right of the blue square?"""
    names = rng.sample(SHAPES, 3)
    places = {names[0]: (0, 0)}
    facts = []
    for name, other in ((names[1], names[0]), (names[2], rng.choice(names[:2]))):
        words, (x, y) = rng.choice(tuple(RELATIONS.items()))
        facts.append(f"The {name} is {words} the {other}.")
        places[name] = (places[other][0] + x, places[other][1] + y)
    pairs = [
        (a, words, b, _holds(places[a], places[b], step))
        for a in names
        for b in names
        for words, step in RELATIONS.items()
        if a != b
    ]
    wanted = rng.random() < 0.5
    a, words, b, _ = rng.choice([pair for pair in pairs if pair[3] == wanted])
    answer = "yes" if wanted else "no"
    return Story(tuple(facts), f"Is the {a} {words} the {b}?", answer, answer, (0, 1))


def _holds(a: tuple[int, int], b: tuple[int, int], step: tuple[int, int]) -> bool:
    return (a[0] - b[0]) * step[0] + (a[1] - b[1]) * step[1] > 0


def sizes(rng: random.Random, world: World) -> Story:
    """qa18: Does the box fit in the chest?"""
    chain = rng.sample(THINGS, 4)  # from small to large
    pairs = [(i, i + 1) for i in range(3)]
    pairs += [tuple(sorted(rng.sample(range(4), 2))) for _ in range(rng.randint(0, 3))]
    facts = [
        f"The {chain[a]} fits inside the {chain[b]}."
        if rng.random() < 0.5
        else f"The {chain[b]} is bigger than the {chain[a]}."
        for a, b in pairs
    ]
    a, b = rng.sample(range(4), 2)
    fits = rng.random() < 0.5
    question = (
        f"Does the {chain[a]} fit in the {chain[b]}?"
        if fits
        else f"Is the {chain[a]} bigger than the {chain[b]}?"
    )
    answer = "yes" if (a < b) == fits else "no"
    return _shuffled(rng, facts, question, answer, tuple(range(min(a, b), max(a, b))))


def path(rng: random.Random, world: World) -> Story | None:
    """qa19: How do you go from the kitchen to the garden? Two steps, such as "s,e"."""
    rooms = rng.sample(world.rooms, min(len(world.rooms), 6))
    places: dict[str, tuple[int, int]] = {rooms[0]: (0, 0)}
    edges: list[tuple[str, str, str]] = []
    for room in rooms[1:]:
        free = [
            (other, side, (x + dx, y + dy))
            for other, (x, y) in places.items()
            for side, (dx, dy) in STEPS.items()
            if (x + dx, y + dy) not in places.values()
        ]
        other, side, place = rng.choice(free)
        places[room] = place
        edges.append((room, side, other))
    steps = {(other, room): side for room, side, other in edges}
    steps |= {(room, other): _opposite(side) for room, side, other in edges}
    walks = [(a, b, c) for a, b in steps for d, c in steps if d == b and c != a]
    if not walks:
        return None
    a, b, c = rng.choice(walks)
    answer = ",".join(steps[pair][0] for pair in ((a, b), (b, c)))
    why = tuple(i for i, (x, _, y) in enumerate(edges) if {x, y} in ({a, b}, {b, c}))
    facts = [f"The {room} is {side} of the {other}." for room, side, other in edges]
    return _shuffled(rng, facts, f"How do you go from the {a} to the {c}?", answer, why)


def _opposite(side: str) -> str:
    x, y = STEPS[side]
    return next(other for other, step in STEPS.items() if step == (-x, -y))


def motives(rng: random.Random, world: World) -> Story:
    """qa20: Where will Sumit go? Why did Yann go to the kitchen?"""
    players = rng.sample(PLAYERS, rng.randint(1, len(PLAYERS)))
    state = {player: rng.choice(tuple(MOTIVES)) for player in players}
    done = dict.fromkeys(players, 0)
    first: dict[str, int] = {}
    facts: list[str] = []
    last = ""
    for _ in range(rng.randint(len(players), 3 * len(players))):
        able = [player for player in players if done[player] < 3]
        last = rng.choice(able)
        room, thing = MOTIVES[state[last]]
        if done[last] == 0:
            first[last] = len(facts)
            facts.append(f"{last} is {state[last]}.")
        elif done[last] == 1:
            facts.append(f"{last} {rng.choice(world.move)} the {room}.")
        else:
            facts.append(f"{last} {rng.choice(world.get)} the {thing} there.")
        done[last] += 1
    room, thing = MOTIVES[state[last]]
    asked, answer = {
        1: (f"Where will {last.lower()} go?", room),
        2: (f"Why did {last.lower()} go to the {room}?", state[last]),
        3: (f"Why did {last.lower()} get the {thing}?", state[last]),
    }[done[last]]
    return Story(tuple(facts), asked, answer, answer, (first[last],))


def _shuffled(
    rng: random.Random, facts: list[str], question: str, answer: str, why: tuple[int, ...]
) -> Story:
    order = rng.sample(range(len(facts)), len(facts))
    supports = tuple(sorted(order.index(i) for i in why))
    return Story(tuple(facts[i] for i in order), question, answer, answer, supports)
