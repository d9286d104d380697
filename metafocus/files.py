"""Files that are whole: each is written beside its place first and then renamed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write a text so that a file of this name is whole or as it was before.

    Raises:
        OSError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(f"{folder}/note.txt", "all of it")
        ...     [path.name for path in Path(folder).iterdir()]
        ['note.txt']
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
