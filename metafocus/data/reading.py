"""Reads chats from files and data sets, in one of the usual formats, and checks each of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from metafocus.data.formats import as_chat
from metafocus.data.messages import check_messages, without_nulls
from metafocus.errors import DataError

Gather = Callable[[Iterable[dict[str, Any]]], Sequence[dict[str, Any]]]
"""Makes a sequence of records that come one by one; `list` holds them in memory."""

_SUFFIXES = (".jsonl", ".json", ".parquet")


def read_chats(
    path: str | Path, *, gather: Gather = list, skipped: list[str] | None = None
) -> Sequence[dict[str, Any]]:
    r"""Read chats from JSON lines, a JSON array or a `.parquet` file, and check each of them.

    Every record has `messages` and optionally `tools`, a list or the JSON text of a list; or it is
    of another format that `metafocus.data.formats` knows (ShareGPT, prompt and completion, Alpaca,
    plain `text`, `input_ids`). Other columns are kept. Blank lines are skipped. Parquet stores null
    for keys that a message does not have; these keys are removed.

    Args:
        path: a `.jsonl`, `.json` or `.parquet` file.
        gather: makes a sequence of the records, which come one by one; `list` holds them in memory.
        skipped: a list that takes the reasons for which records are left out; None: a record that
            is malformed raises.

    Raises:
        DataError: if the file is missing, empty, unreadable or of another kind; if a line is not
            JSON; if the messages of a record (with `skipped`: of all records) are missing or
            malformed. The text names the file and the line.

    Example:
        >>> import json, pathlib, tempfile
        >>> from metafocus.data import read_chats
        >>> chat = {"messages": [{"role": "user", "content": "hi"}]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "chats.jsonl"
        ...     _ = path.write_text(json.dumps(chat) + "\n")
        ...     read_chats(path)
        [{'messages': [{'role': 'user', 'content': 'hi'}]}]
    """
    if not isinstance(path, str | Path):
        raise DataError(f"path={path!r} is not a path: pass a string or a pathlib.Path")
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        fault = "is a directory, not a file" if path.is_dir() else "has an unknown suffix"
        raise DataError(f"path={str(path)!r} {fault}: use {', '.join(_SUFFIXES)}")
    if not _is_file(path):
        raise DataError(f"path={str(path)!r} is not a file: check the name and the folder")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    records = gather(_good(((f"{path}, {place}: ", record) for place, record in rows), skipped))
    if not records:
        raise DataError(f"path={str(path)!r} holds no record: write one chat per line or row")
    return records


def read_dataset(
    name: str,
    config: str | None = None,
    *,
    streaming: bool = False,
    choose: Callable[[list[str]], Iterable[str]] = list,
    limit: int | None = None,
    skipped: list[str] | None = None,
    gather: Gather = list,
) -> dict[str, Sequence[dict[str, Any]]]:
    """Read splits of a data set of chats with the package `datasets`, and check each record.

    Args:
        name: a hub id, a directory with files, as `datasets.load_dataset` takes it, or a directory
            that `Dataset.save_to_disk` wrote.
        config: which of its configurations, if it has several.
        streaming: whether to read records one after another instead of the whole data set.
        choose: returns the splits to read, given the names of all of them; `list` reads all.
        limit: the largest number of records of a split.
        skipped: a list that takes the reasons for which records are left out; None: a record that
            is malformed raises.
        gather: makes a sequence of the records of a split, as in `read_chats`.

    Returns:
        Records as `read_chats` returns them, by the name of the split.

    Raises:
        DataError: the package is missing, the data set cannot be loaded, or a record is malformed.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise DataError(
            "a data set by name needs the package datasets: pip install datasets"
        ) from error
    try:
        found = _loaded(datasets, name, config, streaming)
        parts = {str(part): rows for part, rows in found.items()}
        return {
            part: gather(_good(_numbered(f"{name}, {part}", islice(parts[part], limit)), skipped))
            for part in choose(list(parts))
        }
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"the data set {name!r} cannot be loaded: {reason}") from error


def _numbered(where: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, start=1):
        yield f"{where}, row {number}: ", without_nulls(row)


def _loaded(datasets: Any, name: str, config: str | None, streaming: bool) -> Any:
    saved = [Path(name, file) for file in ("dataset_dict.json", "state.json")]
    if not any(_is_file(path) for path in saved):
        return datasets.load_dataset(name, config, streaming=streaming)
    found = datasets.load_from_disk(name)
    return found if isinstance(found, dict) else {"train": found}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # The name is too long or holds a zero byte.
        return False


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Lines are split as bytes, because Python would also split at other line separators, which
    # JSON text may hold.
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        # One line may be an array of chats, too, or of something else, which is refused later.
        if start[:1] == b"[":
            yield from _array_rows(path, file.read())
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", _json(line, f"{path}, line {number}", _LINE)


_LINE = "write one complete JSON object per line, in UTF-8"


def _array_rows(path: Path, text: bytes) -> Iterator[tuple[str, Any]]:
    records = _json(text, str(path), "write an array of objects, or one object per line, in UTF-8")
    for number, record in enumerate(records, start=1):
        yield f"record {number}", record


def _json(text: bytes, where: str, fix: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply for a chat") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}): {fix}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; refuse a key that occurs twice, because one would be ignored."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key {twice!r:.80} appears twice in one object: remove one")
    return found


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def records() -> Iterator[Any]:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"path={str(path)!r} cannot be read as parquet ({error}): the file may be cut off, "
                "write or download it again"
            ) from error

    for number, record in enumerate(records(), start=1):
        yield f"row {number}", without_nulls(record)


def _good(rows: Iterable[tuple[str, Any]], skipped: list[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the records that are well-formed; the reasons for the others go into `skipped`."""
    first: DataError | None = None
    found = 0
    for where, record in rows:
        try:
            good = _checked(record, where)
        except DataError as error:
            if skipped is None:
                raise
            first = first or error
            skipped.append(str(error))
        else:
            found += 1
            yield good
    if first is not None and not found:
        raise first


def _checked(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}{record!r:.80} is not an object with messages")
    try:
        record = as_chat(record)
        if isinstance(record.get("tools"), str):
            record["tools"] = _tools(record["tools"])
        tools = record.get("tools")
        if tools is not None and not isinstance(tools, list):
            raise DataError(f"tools={tools!r:.80} is not a list of function descriptions")
        if "messages" in record:
            check_messages(record["messages"])
    except DataError as error:
        raise DataError(f"{where}{error}") from error
    return record


def _tools(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"tools is a string, but not JSON ({error})") from error
