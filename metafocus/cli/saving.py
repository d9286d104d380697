"""Writing results: a disk that is full ends in one line, whatever library met it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metafocus.errors import DataError


@contextmanager
def saving(place: Path, what: str) -> Iterator[None]:
    """Turn what goes wrong in writing into one error that names the place.

    Raises:
        DataError: for a full disk, a limit on the size of files, a directory that has gone.
    """
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        # tokenizers raises bare exceptions.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise DataError(
            f"{what} could not be written to {place}: {reason}. What lies there is not whole; make "
            "room, or name another directory."
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text under another name first: a file of this name is whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)
