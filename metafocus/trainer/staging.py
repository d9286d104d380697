"""Checkpoints are written beside their place and renamed: one of that name is always whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from metafocus.trainer.checkpoints import SEAL, checkpoints, step_of

STAGE = ".saving"
"""The directory in which a checkpoint grows, inside the output directory: of one file system."""

_REPLACED = "replaced"


def clean(folder: Path) -> None:
    """Remove what a process left that was killed while it saved.

    A checkpoint that was moved away to make room for its successor goes back to its place, if the
    successor did not get there.
    """
    stage = folder / STAGE
    for old in (stage / _REPLACED).glob("checkpoint-*"):
        if not (folder / old.name).exists():
            old.rename(folder / old.name)
    shutil.rmtree(stage, ignore_errors=True)


def publish(folder: Path, name: str) -> None:
    """Give a checkpoint that was written below `STAGE` its name, when the disk has all of it.

    Raises:
        OSError: if the place is taken, or if the disk fails.
    """
    made, place = folder / STAGE / name, folder / name
    for path in made.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(made)
    if place.is_dir():
        (folder / STAGE / _REPLACED).mkdir()
        place.rename(folder / STAGE / _REPLACED / name)
    made.rename(place)
    _sync(folder)
    shutil.rmtree(folder / STAGE, ignore_errors=True)


def rotate(folder: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the checkpoints of the fewest steps, until `limit` of those saved whole are left.

    By step and not by the time of a file: a clock may go backwards.

    Args:
        folder: the output directory.
        limit: how many may stay; None or 0: all.
        keep: are never deleted: the newest of this run, and the best.
    """
    if not limit or limit < 0:
        return
    whole = sorted((p for p in checkpoints(folder) if (p / SEAL).exists()), key=step_of)
    excess = len(whole) - max(limit, len(keep & set(whole)))
    for path in [path for path in whole if path not in keep][: max(excess, 0)]:
        # It loses its name at once, because a directory that is half deleted is not a checkpoint.
        (folder / STAGE).mkdir(exist_ok=True)
        path.rename(folder / STAGE / path.name)
    shutil.rmtree(folder / STAGE, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a directory."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
