"""Files that are whole: each is written beside its place first and then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from metafocus.errors import DataError


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yield the name of a temporary file, which takes the place of `path` when the block ends.

    After an exception the temporary file is removed, and what was at `path` stays.
    """
    path = Path(path)
    # Two processes may write the same file, and so may two threads of one.
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def check_utf8(name: str, text: str) -> None:
    """Raise for a path that is not UTF-8, which no file of settings or weights could hold.

    Args:
        name: the argument.
        text: its value, in which Python has kept the bytes that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{name}={text!a} is not UTF-8: rename it, or name another.") from error


def existing(path: str | Path, advice: str) -> Path:
    """Return the path of a file, or raise if there is none.

    Raises:
        DataError: with the path and the advice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"path={str(path)!r} is not a file: {advice}")
    return path


def text_of(path: Path, name: str) -> str:
    """Return the text in a file in UTF-8.

    Raises:
        DataError: with the name and the reason.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"not UTF-8 ({error})"
        raise DataError(f"{name} cannot be read: {reason}.") from error


def unwritable(name: str, folder: Path, error: OSError) -> DataError:
    """Return the error for a directory that cannot be written to."""
    reason = error.strerror or error
    return DataError(
        f"{name}={str(folder)!r} cannot be written to: {reason}. Name another directory."
    )


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
    with replaced(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str | Path, value: Any, *, indent: int = 2) -> None:
    """Write a value as JSON with `write_whole`; numbers that are not finite become null."""
    write_whole(path, json.dumps(finite(value), indent=indent, ensure_ascii=False) + "\n")


def write_json_lines(path: str | Path, records: Iterable[Any]) -> None:
    """Write one JSON object a line, so that the file is whole or as it was before."""
    with replaced(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def finite(value: Any) -> Any:
    """Return a value as JSON takes it, with None for each number that is not finite.

    Example:
        >>> finite({"error": float("nan"), "steps": (1, 2)})
        {'error': None, 'steps': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that is whole or as it was before; its directory is created.

    Raises:
        DataError: if it cannot be written: a full disk, or a directory that is a file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as part:
            save_file(dict(tensors), part, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(
            f"{path} could not be written ({reason}); what was there before is untouched"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        DataError: if it is missing or cut off.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = "is missing" if not path.is_file() else f"is cut off or no safetensors ({error})"
        raise DataError(f"{path} {reason}; save the fast weights again") from error


def sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
