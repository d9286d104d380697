"""The facts of people and objects in a text, found by the tables of a world."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from metafocus.evals.babilong.worlds import World


class Fact(NamedTuple):
    """One sentence: who did what to which room or object, and to whom."""

    actor: str
    kind: str
    what: str
    receiver: str | None


def any_of(words: Sequence[str]) -> str:
    """Return a regular expression for any of some words, the longest first."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def read(context: str, world: World) -> list[Fact]:
    """Return the facts of a text in order; other sentences are passed over."""
    kinds = {
        verb: kind for kind in ("move", "get", "drop", "give") for verb in getattr(world, kind)
    }
    people = any_of(world.people + world.givers)
    pattern = re.compile(
        rf"(?<!\w)({people}) ({any_of(tuple(kinds))}) the ({any_of(world.rooms + world.objects)})"
        rf"(?: to ({people}))?(?:{any_of(world.tails)})\."
    )
    return [
        Fact(actor, kinds[verb], what, receiver)
        for actor, verb, what, receiver in (m.groups() for m in pattern.finditer(context))
    ]
