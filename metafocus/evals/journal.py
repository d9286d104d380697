"""Answers on disk as they come: one JSON object a line, flushed to the disk after each batch.

A killed evaluation, a full disk or a failed request loses at most the batch that was being
answered. The next run with the same settings reads the file and asks only what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from metafocus.errors import DataError
from metafocus.files import write_json, write_json_lines

Key = tuple[str, str, int, int]
"""Suite, task, length and number of a question; for trials the length is the number of the try."""


def digest(text: str) -> str:
    """Return a short fingerprint of a text, such as a prompt."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Journal:
    """The answers of one evaluation in a file, for one process at a time.

    Every line has the key of its question, the digest of its prompt and the digest of the settings.
    A line counts only if all three are the same, so changed settings, texts or code never mix.

    Args:
        path: the file; its folder is created.
        settings: what determines an answer apart from its prompt; they are written beside it.

    Raises:
        DataError: if another process writes to the file, if it was made with other settings, or if
            it cannot be opened.

    Example:
        >>> import tempfile
        >>> from metafocus.evals.journal import Journal
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Journal(f"{folder}/answers.jsonl", {"model": "m"}) as journal:
        ...         journal.add([(("ruler", "vt", 4096, 0), "a prompt", {"output": "A"})])
        ...     with Journal(f"{folder}/answers.jsonl", {"model": "m"}) as journal:
        ...         journal.get(("ruler", "vt", 4096, 0), "a prompt")["output"]
        'A'
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path: Path = Path(path)
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
        self.mark: str = digest(json.dumps(self.settings, sort_keys=True))
        self._records: dict[Key, dict[str, Any]] = {}
        self._file: FileIO | None = None
        self._lock: FileLock = FileLock(f"{self.path}.lock")

    @property
    def beside(self) -> Path:
        """The file with the settings."""
        return self.path.with_suffix(".settings.json")

    def __enter__(self) -> Journal:
        """Take the lock, read the answers that are there, and open the file to append to it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise DataError(
                f"{self.path} is being written by another evaluation: wait until it ends, or name "
                "another directory"
            ) from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}") from error
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Close the file and release the lock."""
        self.close()

    def close(self) -> None:
        """Close the file and release the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock.is_locked:
            # While it is held: the next evaluation makes a file of its own.
            with contextlib.suppress(OSError):
                Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def _open(self) -> None:
        records, whole = _read(self.path)
        own = [record for record in records if record.get("settings_digest") == self.mark]
        if records and not own:
            raise DataError(
                f"{self.path} holds {len(records)} answers that were made with other settings"
                f"{self._changes()}: name another directory, or pass --overwrite_output_dir"
            )
        for record in own:
            self._records[_key(record["key"])] = record
        try:
            write_json(self.beside, self.settings)
            # Without a buffer, which would be written after an error too.
            self._file = self.path.open("ab", buffering=0)
            # A line that was cut off by a kill would spoil the next one.
            self._file.truncate(whole)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}") from error

    def _changes(self) -> str:
        try:
            before = json.loads(self.beside.read_text(encoding="utf-8"))
            names = sorted({*before, *self.settings})
            found = [
                f"{name} was {before.get(name)!r:.60}, now {self.settings.get(name)!r:.60}"
                for name in names
                if before.get(name) != self.settings.get(name)
            ]
        except (OSError, ValueError, TypeError):
            return ""
        return f" ({'; '.join(found)})" if found else ""

    def __len__(self) -> int:
        """Return the number of answers."""
        return len(self._records)

    def get(self, key: Key, prompt: str) -> dict[str, Any] | None:
        """Return the record of a question, or None if its prompt was not answered yet."""
        record = self._records.get(key)
        return (
            record if record is not None and record.get("prompt_digest") == digest(prompt) else None
        )

    def add(self, answers: Iterable[tuple[Key, str, Mapping[str, Any]]]) -> None:
        """Append answers, each with its key and its prompt, and flush them to the disk.

        Raises:
            DataError: if they cannot be written. The file then ends with the answers before them.
        """
        made = [
            {
                **record,
                "key": list(key),
                "prompt_digest": digest(prompt),
                "settings_digest": self.mark,
            }
            for key, prompt, record in answers
        ]
        self._append(made)

    def records(self, keys: Iterable[Key]) -> list[dict[str, Any]]:
        """Return the records of answered questions, as another process merges them."""
        return [self._records[key] for key in keys]

    def merge(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records that another process made with the same settings and that are new here.

        Raises:
            DataError: as `add` does.
        """
        own = [record for record in records if record.get("settings_digest") == self.mark]
        self._append([record for record in own if _key(record["key"]) not in self._records])

    def discard(self) -> None:
        """Close the file and delete it, after another process has merged its answers."""
        self.close()
        self.path.unlink(missing_ok=True)
        self.beside.unlink(missing_ok=True)

    def _append(self, made: list[dict[str, Any]]) -> None:
        assert self._file is not None
        lines = "".join(json.dumps(record) + "\n" for record in made).encode()
        before = os.fstat(self._file.fileno()).st_size
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            raise DataError(
                f"{self.path} cannot be written ({error.strerror}); {len(self._records)} answers "
                "are kept. Make room, and run the same command again: it asks only what is missing"
            ) from error
        for record in made:
            self._records[_key(record["key"])] = record

    def finish(self, keys: Sequence[Key]) -> None:
        """Write the file anew with these answers in this order, whole or not at all."""
        write_json_lines(self.path, (self._records[key] for key in keys))


def records_in(path: Path) -> list[dict[str, Any]]:
    """Return the records in a file of answers, of whatever settings.

    Raises:
        DataError: if a line is not an answer of an evaluation.
    """
    return _read(path)[0]


def _key(value: Sequence[Any]) -> Key:
    suite, task, length, index = value
    return str(suite), str(task), int(length), int(index)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of a file and the number of bytes of its whole lines."""
    if not path.exists():
        return [], 0
    records, whole = [], 0
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                if not isinstance(record, dict) or len(record["key"]) != 4:
                    raise ValueError("no key of four parts")
                records.append(record)
                whole += len(line)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}, line {len(records) + 1}: not an answer of an evaluation ({error}). Name "
            "another directory, or pass --overwrite_output_dir"
        ) from error
    return records, whole
