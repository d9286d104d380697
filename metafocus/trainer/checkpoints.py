"""Checkpoints: which one is resumed, the newest that was written to its end; and full disks."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from metafocus.errors import DataError

SEAL = "trainer_state.json"
"""Written last: a directory without it belongs to a process that was killed while saving."""

Judge = Callable[[Path], str | None]

_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin",
)  # fmt: skip


def resumable(output_dir: str | Path, *, misfit: Judge | None = None) -> Path | None:
    """Return the newest complete checkpoint in a directory; None to start from the beginning.

    Newer ones that are not complete are left where they are, with a warning.

    Args:
        output_dir: of the run.
        misfit: says why a complete checkpoint cannot be used all the same, or None.

    Raises:
        DataError: if no checkpoint is complete although one was written to its end: it has been
            damaged since, and starting over would hide that.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(resumable(folder))
        None
    """
    faults: dict[Path, str] = {}
    for path in sorted(checkpoints(Path(output_dir)), key=step_of, reverse=True):
        fault = damage(path) or (misfit(path) if misfit else None)
        if fault is None:
            _warn_passed_over(faults, f"resuming from {path.name}")
            return path
        faults[path] = fault
    broken = {path: fault for path, fault in faults.items() if (path / SEAL).exists()}
    if broken:
        path, fault = next(iter(broken.items()))
        raise DataError(
            f"no checkpoint in {output_dir} can be resumed; the newest that was saved to its end, "
            f"{path.name}, is damaged: {fault}. Restore it, name another with "
            "resume_from_checkpoint=PATH, or delete it to start over."
        )
    _warn_passed_over(faults, "starting from the beginning")
    return None


def require_complete(path: str | Path, *, misfit: Judge | None = None) -> Path:
    """Return the path of a checkpoint that is complete; the arguments are those of `resumable`.

    Raises:
        DataError: if it is not, with what is wrong.
    """
    fault = damage(Path(path)) or (misfit(Path(path)) if misfit else None)
    if fault is not None:
        raise DataError(
            f"resume_from_checkpoint={str(path)!r} cannot be resumed: {fault}. Pass True to use "
            "the newest complete checkpoint of the output directory."
        )
    return Path(path)


def damage(path: Path) -> str | None:
    """Say what is missing or cut off in a checkpoint directory; None if it is complete.

    Looks at headers and sizes, not at every byte.

    Example:
        >>> damage(Path("nowhere/checkpoint-3"))
        'it is not a directory'
    """
    if not path.is_dir():
        return "it is not a directory"
    if not (path / SEAL).exists():
        return f"{SEAL} is missing, which is written last: saving was interrupted"
    try:
        state = json.loads((path / SEAL).read_text())
        step = state["global_step"]
    except (ValueError, KeyError, TypeError):
        return f"{SEAL} is cut off"
    number = step_of(path)
    if number >= 0 and step != number:
        return f"{SEAL} is of step {step}"
    if any(path.glob("pytorch_model_fsdp*")):
        # The sharded formats of FSDP check themselves when they are read.
        return None
    weights = [path / name for name in _WEIGHTS if (path / name).exists()]
    if not weights:
        return "there are no model weights"
    for file in weights:
        try:
            shards = _shards(file)
        except (ValueError, KeyError, TypeError):
            return f"{file.name} is cut off"
        for shard in shards:
            if not _whole(shard):
                return f"{shard.name} is missing or cut off"
    if (path / "optimizer.bin").exists() or any(path.glob("global_step*")):
        return None
    random = sorted(file.name for file in path.glob("rng_state*.pth")) or ["rng_state.pth"]
    for name in ("optimizer.pt", "scheduler.pt", *random):
        if not (path / name).exists():
            return f"{name} is missing (saved with save_only_model)"
        if not _whole(path / name):
            return f"{name} is cut off"
    return None


def other_ranks(path: Path, ranks: int) -> str | None:
    """Say what differs if another number of processes saved a checkpoint; None if it is the same.

    Example:
        >>> other_ranks(Path("nowhere"), 1) is None
        True
    """
    saved = len(list(path.glob("rng_state_*.pth"))) or 1
    if saved == ranks:
        return None
    return (
        f"{path.name} was saved by {saved} processes and is resumed by {ranks}: weights, optimiser "
        "state, data and the starts of fast weights go on as they would have, if "
        "gradient_accumulation_steps x processes is the same; random numbers of layers, such as "
        "dropout, are drawn anew."
    )


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the directories that have the name of a checkpoint, in no order."""
    found = output_dir.glob("checkpoint-*") if output_dir.is_dir() else ()
    return [path for path in found if path.is_dir() and step_of(path) >= 0]


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint; -1 for another name.

    Example:
        >>> step_of(Path("run/checkpoint-12")), step_of(Path("run"))
        (12, -1)
    """
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match.group(1)) if match else -1


def _shards(file: Path) -> list[Path]:
    if not file.name.endswith(".index.json"):
        return [file]
    names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
    return [file.parent / name for name in names]


def _whole(file: Path) -> bool:
    """Whether a safetensors or torch file is as long as its header or directory says."""
    if not file.is_file():
        return False
    if file.suffix != ".safetensors":
        return zipfile.is_zipfile(file)
    from safetensors import SafetensorError, safe_open

    try:
        # The header is read, and compared with the size of the file.
        with safe_open(file, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _warn_passed_over(faults: dict[Path, str], outcome: str) -> None:
    for path, fault in faults.items():
        warnings.warn(f"{path} is passed over: {fault}; {outcome}.", stacklevel=4)


@contextmanager
def saving(
    place: str | Path, what: str, left: str = "What lies there is not whole"
) -> Iterator[None]:
    """Turn what goes wrong in writing into one error that names the place.

    Args:
        place: what is written to.
        what: what is written.
        left: what is there now.

    Raises:
        DataError: for a full disk, a limit on the size of files, a directory that has gone.
    """
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        # tokenizers raises bare exceptions, and torch.save bare RuntimeErrors; those of kernels
        # and of collectives are subclasses.
        bare = type(error) in (Exception, RuntimeError)
        if not isinstance(error, OSError | SafetensorError) and not bare:
            raise
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        if bare and _full(Path(place)):
            # What torch says of it names a line of its own source.
            reason = os.strerror(errno.ENOSPC)
        raise DataError(
            f"{what} could not be written to {place}: {reason}. {left}; make room, or name "
            "another directory."
        ) from error


def _full(place: Path) -> bool:
    """Whether the file system of a place has less than a mebibyte left."""
    there = next((path for path in (place, *place.absolute().parents) if path.exists()), None)
    return there is not None and shutil.disk_usage(there).free < 2**20
