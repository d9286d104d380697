"""The marker `claim` states a claim; the fixture `claim` records what its test measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

MEASURED = pytest.StashKey[dict[str, Any]]()
"""On an item: the values that its test recorded, by the id of the claim."""


def claim(
    id: str, *, paper: str, says: str, published: str, note: str = "", asserted: bool = True
) -> dict[str, Any]:
    """Return a claim as a dict; the arguments are those of the marker.

    Args:
        id: a short name, by which `--claims-only` selects; several tests may share it.
        paper: where the claim was published.
        says: the claim, in one sentence.
        published: the published value or figure.
        note: what the reader must know about the form that is tested here.
        asserted: False if the test measures and asserts nothing about the claim.

    Returns:
        The arguments by name.

    Raises:
        TypeError: if an argument has the wrong type, or the id is empty or has a comma.
    """
    texts = {"id": id, "paper": paper, "says": says, "published": published, "note": note}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"claim(): {name} must be a string, got {text!r}")
    if not id or "," in id:
        raise TypeError(f"claim(): id must be a word without commas, got {id!r}")
    if not isinstance(asserted, bool):
        raise TypeError(f"claim(): asserted must be True or False, got {asserted!r}")
    return {**texts, "asserted": asserted}


def claims_of(item: pytest.Item) -> list[dict[str, Any]]:
    """Return the claims of an item, in the order in which its markers are written.

    Raises:
        pytest.UsageError: if a marker is incomplete, or two have the same id.
    """
    found: dict[str, dict[str, Any]] = {}
    for mark in reversed(list(item.iter_markers("claim"))):
        try:
            one = claim(*mark.args, **mark.kwargs)
        except TypeError as error:
            raise pytest.UsageError(
                f"{item.nodeid}: {error}. Write @pytest.mark.claim(id, paper=..., says=..., "
                "published=...); note= and asserted= are optional."
            ) from None
        if one["id"] in found:
            raise pytest.UsageError(f"{item.nodeid} states the claim {one['id']!r} twice")
        found[one["id"]] = one
    return list(found.values())


class Claim:
    """The fixture `claim` of one test: a function that records what the test measured.

    Attributes:
        full: whether the published budget is wanted (`--claims-full`) rather than a quick one.
    """

    def __init__(self, item: pytest.Item, *, full: bool):
        self.full = full
        self._test = item.nodeid
        self._ids = [one["id"] for one in claims_of(item)]
        self._measured = item.stash[MEASURED] = {}

    def __call__(self, measured: Any, *, id: str | None = None) -> None:
        """Record a measured value; of several calls for one claim the last counts.

        Call it before the assertions, so that a claim that fails has its number in the report.

        Args:
            measured: numbers, strings, tensors, arrays, and lists and dicts of these.
            id: which claim it belongs to, if the test states several.

        Raises:
            pytest.UsageError: if the test states no such claim.
            TypeError: if JSON cannot hold the value.
        """
        if not self._ids:
            raise pytest.UsageError(f"{self._test} states no claim: add @pytest.mark.claim(...)")
        if id is None and len(self._ids) > 1:
            raise pytest.UsageError(f"{self._test} states the claims {self._ids}: give id=")
        if id is not None and id not in self._ids:
            raise pytest.UsageError(f"{self._test} states the claims {self._ids}, not {id!r}")
        self._measured[id or self._ids[0]] = plain(measured)


def plain(value: Any) -> Any:
    """Return a value as JSON holds it; numbers that are not finite become strings.

    Raises:
        TypeError: if JSON cannot hold it.

    Example:
        >>> plain({"error": float("nan"), 2: (1, True)})
        {'error': 'nan', '2': [1, True]}
    """
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        # float() because NumPy's float64 is a float too, and is printed with its type.
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):  # tensors and arrays
        return plain(value.tolist())
    raise TypeError(
        "a measured value consists of numbers, strings, tensors, lists and dicts, not "
        f"{type(value).__name__}"
    )
