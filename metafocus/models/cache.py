"""Directories that are made once, in the user's cache directory, and checked when they are used."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from metafocus.errors import DataError
from metafocus.files import sha256, write_json

MANIFEST = "checksums.json"
_ADVICE = "Make room, or name another directory with the environment variable METAFOCUS_CACHE."


def root() -> Path:
    """Return `METAFOCUS_CACHE`, or `metafocus` in `XDG_CACHE_HOME`, or `~/.cache/metafocus`."""
    if named := os.environ.get("METAFOCUS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metafocus"


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the directory `name` of the cache; `make(directory)` fills it if it is not there yet.

    It is made under another name and renamed when it is whole. A checksum of each file is kept, and
    a directory whose files do not have theirs is made again. Processes wait for each other.

    Raises:
        DataError: if the cache cannot be written to.
    """
    from filelock import FileLock

    home, final = root(), root() / name
    # Look without the lock first, because a filled cache may be on a read-only disk.
    if _whole(final):
        return final
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f"{name}.lock"):
            if not _whole(final):
                _fill(final, make)
    except OSError as error:
        raise DataError(
            f"the cache directory {home} cannot be written to ({error.strerror or error}). "
            f"{_ADVICE}"
        ) from error
    return final


def require_space(directory: Path, size: int) -> None:
    """Raise if there is no room for `size` bytes in a directory."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise DataError(
            f"{size / 1e6:.0f} MB are needed in the cache directory {directory}, which has "
            f"{free / 1e6:.0f} MB free. {_ADVICE}"
        )


def _whole(directory: Path) -> bool:
    try:
        expected = json.loads((directory / MANIFEST).read_text())
        return all(sha256(directory / name) == found for name, found in expected.items())
    except (OSError, ValueError, AttributeError):
        return False


def _fill(final: Path, make: Callable[[Path], None]) -> None:
    if final.exists():
        print(f"note: {final} is damaged and is made again.", file=sys.stderr)
        shutil.rmtree(final)
    part = Path(tempfile.mkdtemp(prefix=f"{final.name}.", suffix=".part", dir=final.parent))
    try:
        make(part)
        files = sorted(path.name for path in part.iterdir())
        write_json(part / MANIFEST, {name: sha256(part / name) for name in files})
        # Others may read it too, because a cache may be shared.
        for path in part.iterdir():
            path.chmod(0o644)
        part.chmod(0o755)
        part.rename(final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
