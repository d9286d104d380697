"""Notes: what a call does, written down where it is done, for `mf.explain`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from metafocus.calls.owners import current


def noting() -> bool:
    """Return whether the current call is being explained."""
    call = current()
    return call is not None and call.notes is not None


def note(topic: str, text: str) -> None:
    """Write a line about the current call under a topic, once, if the call is being explained."""
    call = current()
    if call is not None and call.notes is not None:
        lines = call.notes.setdefault(topic, [])
        if text not in lines:
            lines.append(text)


@contextlib.contextmanager
def noting_into(found: dict[str, list[str]]) -> Iterator[None]:
    """Write the notes of what the current call does inside this block into a dict, by topic."""
    call = current()
    assert call is not None
    before, call.notes = call.notes, found
    try:
        yield
    finally:
        call.notes = before
