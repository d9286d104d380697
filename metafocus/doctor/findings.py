"""One line of the report."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """What was looked at, what was found, and whether it is as it should be."""

    name: str
    value: str
    good: bool | None = None
    """None: there is nothing to judge."""
