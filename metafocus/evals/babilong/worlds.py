"""The names and verbs of a bAbI world, as tables that can be replaced."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from itertools import chain

from metafocus.errors import DataError
from metafocus.evals.babilong.lexicon import LABELS, NAMES

# The largest number of facts of a published sample; a longer story is drawn again.
MOST_FACTS = {"qa1": 10, "qa2": 68, "qa3": 32, "qa4": 2, "qa5": 126}
MOST_FACTS |= {f"qa{i}": 26 for i in range(6, 21)}
LEADERBOARD = tuple(f"qa{i}" for i in range(1, 6))
"""The tasks whose mean BABILong's leaderboard shows."""
TASKS = tuple(MOST_FACTS)

# The two directions of each axis.
AXES = (("north", "south"), ("east", "west"))


@dataclass(frozen=True)
class World:
    """Names and verbs. `givers` are the people of qa5; `tails` may end a get or a drop.

    The defaults are the names and verbs of the published BABILong samples.

    Raises:
        DataError: if a table has too few entries, if a word is in two tables, or if a name is
            inside another (scorers look for names as substrings).

    Example:
        >>> from metafocus.evals.babilong import World
        >>> World(rooms=("attic", "cellar", "porch")).labels("qa1")
        ('attic', 'cellar', 'porch')
    """

    rooms: tuple[str, ...] = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
    people: tuple[str, ...] = ("Daniel", "John", "Mary", "Sandra")
    objects: tuple[str, ...] = ("apple", "football", "milk")
    givers: tuple[str, ...] = ("Bill", "Fred", "Jeff", "Mary")
    move: tuple[str, ...] = (
        "went to",
        "went back to",
        "journeyed to",
        "travelled to",
        "moved to",
    )
    get: tuple[str, ...] = ("got", "took", "grabbed", "picked up")
    drop: tuple[str, ...] = ("dropped", "put down", "left", "discarded")
    give: tuple[str, ...] = ("gave", "handed", "passed")
    tails: tuple[str, ...] = ("", " there")

    def __post_init__(self) -> None:
        least = {"rooms": 3, "people": 2, "objects": 1, "givers": 3}
        for field in fields(self):
            table = getattr(self, field.name)
            need = least.get(field.name, 1)
            if len(set(table)) != len(table) or len(table) < need:
                raise DataError(f"{field.name}={table!r}: give {need} or more, each once")
        for names in (self.labels("qa1") + self.objects + self.people, self.labels("qa5")):
            for name in names:
                inside = [o for o in names if o != name and name.lower() in o.lower()]
                if inside or not re.fullmatch(r"[A-Za-z]+", name):
                    raise DataError(
                        f"the name {name!r} is not a plain word or is part of {inside}: "
                        "scorers could not tell them apart; rename it"
                    )
        verbs = list(chain(self.move, self.get, self.drop, self.give))
        twice = {verb for verb in verbs if verbs.count(verb) > 1}
        if twice:
            raise DataError(f"the verbs {sorted(twice)} mean two things: keep each in one table")

    def labels(self, task: str) -> tuple[str, ...]:
        """Return the words that the official scorer looks for: the possible answers of a task."""
        if task == "qa5":
            return self.givers + self.objects
        if task == "qa8":
            return (*self.objects, "nothing")
        return LABELS.get(task, self.rooms)

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the world."""
        return tuple(dict.fromkeys(self.rooms + self.people + self.objects + self.givers))

    def task_names(self, task: str) -> tuple[str, ...]:
        """Return the names that the noise of a task must not contain."""
        return self.names if task in LEADERBOARD else (*self.names, *NAMES)
