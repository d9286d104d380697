"""Decisions that one rank takes for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from metafocus.errors import DataError

Result = TypeVar("Result")


def from_first(decide: Callable[[], Result]) -> Result:
    """Return what the first rank decides, on every rank; a `DataError` is raised on every rank.

    A rank that raised alone would leave the others waiting for it in their next exchange.

    Example:
        >>> from_first(lambda: 3)
        3
    """
    state = PartialState()
    if state.num_processes == 1:
        return decide()
    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found[0] = decide()
        except DataError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise DataError(found[1])
    return found[0]
