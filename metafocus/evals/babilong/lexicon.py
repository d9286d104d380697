"""The names of tasks 6 to 20 that are not those of a `World`, as in the published samples."""

from __future__ import annotations

PLACES: tuple[str, ...] = ("bedroom", "cinema", "kitchen", "office", "park", "school")
FRIENDS: tuple[str, ...] = ("Bill", "Fred", "Julie", "Mary")
PRONOUNS = {"Daniel": "he", "John": "he", "Mary": "she", "Sandra": "she"}
LATER: tuple[str, ...] = ("After that", "Afterwards", "Then", "Following that")
TIMES: tuple[str, ...] = ("yesterday", "this morning", "this afternoon", "this evening")
COUNTS: tuple[str, ...] = ("none", "one", "two", "three")

SPECIES = {"cat": "Cats", "mouse": "Mice", "sheep": "Sheep", "wolf": "Wolves"}
PETS: tuple[str, ...] = ("Gertrude", "Winona", "Emily", "Jessica")
KINDS: tuple[str, ...] = ("frog", "lion", "rhino", "swan")
ANIMALS: tuple[str, ...] = ("Bernhard", "Brian", "Greg", "Julius", "Lily")
COLORS: tuple[str, ...] = ("gray", "green", "white", "yellow")

SHAPES: tuple[str, ...] = (
    "red sphere",
    "blue square",
    "pink rectangle",
    "yellow square",
    "red square",
    "triangle",
)
# The words of a relation, and the step from the second shape to the first.
RELATIONS = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, 1),
    "below": (0, -1),
}
THINGS: tuple[str, ...] = (
    "chocolate",
    "box of chocolates",
    "chest",
    "suitcase",
    "container",
    "box",
)
STEPS = {"east": (1, 0), "west": (-1, 0), "north": (0, 1), "south": (0, -1)}

# For each state the room that it leads to, and what is taken there.
MOTIVES = {
    "bored": ("garden", "football"),
    "hungry": ("kitchen", "apple"),
    "thirsty": ("kitchen", "milk"),
    "tired": ("bedroom", "pajamas"),
}
PLAYERS: tuple[str, ...] = ("Antoine", "Jason", "Sumit", "Yann")

_YES_NO = ("no", "yes")
LABELS: dict[str, tuple[str, ...]] = {
    "qa6": _YES_NO,
    "qa7": ("none", "one", "three", "two"),
    "qa9": _YES_NO,
    "qa10": ("maybe", *_YES_NO),
    "qa14": PLACES,
    "qa15": tuple(SPECIES),
    "qa16": COLORS,
    "qa17": _YES_NO,
    "qa18": _YES_NO,
    "qa19": ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"),
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}
"""The labels of the official scorer, for tasks whose labels are not in a `World`."""

NAMES = (
    *PLACES, *FRIENDS, *SPECIES, *map(str.lower, SPECIES.values()), *PETS, *KINDS, *ANIMALS,
    *SHAPES, *THINGS, *PLAYERS, "pajamas",
)  # fmt: skip
"""All names here, which the noise must not contain."""
