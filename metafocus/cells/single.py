"""One cell of a sweep: the name of its file, its lock, and its record."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metafocus.errors import DataError, ProblemError
from metafocus.files import finite, write_json


def name_of(cell: Any) -> str:
    """Return the hash of a cell's content, which names its file.

    Example:
        >>> name_of({"lr": 0.1, "steps": 2}) == name_of({"steps": 2, "lr": 0.1})
        True
    """
    try:
        text = json.dumps(_plain(cell), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ProblemError(
            f"the cell {cell!r} cannot be written as JSON ({error}): make it of finite numbers, "
            "texts, lists and dicts."
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def one_cell(
    fn: Callable[[Any], Any], cell: Any, path: Path, code: str | None, retry: bool, wait: bool
) -> bool:
    """Run one cell under its lock and write its file; return whether it has one.

    Args:
        fn: the function.
        cell: what it takes.
        path: of the cell's file.
        code: the hash of the function, for the file.
        retry: whether a failure that another run has written before counts as nothing.
        wait: whether to wait while another run has the lock; otherwise the answer is False.
    """
    from filelock import FileLock, Timeout

    before = read(path, fn)
    lock = FileLock(path.parent / ".locks" / f"{path.stem}.lock", timeout=-1 if wait else 0)
    try:
        with lock:
            # It may have ended while we waited: then its file is another one than before.
            now = read(path, fn)
            if not (settled(now, retry) or now != before):
                write_json(path, _record(fn, cell, code), indent=1)
            # Whoever opens a new lock from here on finds the file, so the old one may go.
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def _record(fn: Callable[[Any], Any], cell: Any, code: str | None) -> dict[str, Any]:
    start = time.perf_counter()
    result, trace = None, None
    try:
        result = fn(cell)
        json.dumps(finite(result))
    except Exception:
        result, trace = None, traceback.format_exc()
    seconds = time.perf_counter() - start
    return {
        "function": _function(fn),
        "code": code,
        "cell": _plain(cell),
        "result": result,
        "error": trace,
        "seconds": seconds,
    }


def settled(record: dict[str, Any] | None, retry: bool) -> bool:
    """Return whether a cell need not be run."""
    return record is not None and not (retry and record["error"])


def read(path: Path, fn: Callable[[Any], Any]) -> dict[str, Any] | None:
    """Return the record of a cell, or None if it has none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        theirs = record["function"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a file of a sweep: remove it, or name another folder."
        ) from error
    if theirs != _function(fn):
        raise DataError(
            f"folder={str(path.parent)!r} holds results of {theirs}, not of {_function(fn)}: name "
            "another folder."
        )
    return record


def _plain(cell: Any) -> Any:
    if dataclasses.is_dataclass(cell) and not isinstance(cell, type):
        return dataclasses.asdict(cell)
    return cell


def _function(fn: Any) -> str:
    # A partial function is the one that it calls.
    fn = getattr(fn, "func", fn)
    return getattr(fn, "__qualname__", type(fn).__qualname__)
