"""From a file of chats to samples and batches: read, encode, collate, pack.

A file holds one record per line or row: `messages`, as chat models take them, and optionally
`tools`. A sample is a dict of 1-D tensors, a batch the same names as `[B, S]`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metafocus.batches import Collator, collate, pack
from metafocus.chat import Sample, check_max_length, encode_chat, truncate
from metafocus.errors import DataError
from metafocus.messages import check_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Collator",
    "Encoded",
    "Sample",
    "collate",
    "encode_chat",
    "encode_chats",
    "pack",
    "read_chats",
]

_SUFFIXES = (".jsonl", ".json", ".parquet")


def read_chats(path: str | Path) -> list[dict[str, Any]]:
    r"""Read chats from JSON lines (`.jsonl`, `.json`) or a `.parquet` file, and check each of them.

    Every record has `messages` and optionally `tools`, a list or the JSON text of one; other
    columns are kept. Blank lines are skipped. Parquet fills the keys that a message lacks with
    nulls, which are taken out again.

    Raises:
        DataError: the file is missing, empty, unreadable or of another kind; a line is not JSON;
            a record's messages are missing or malformed. The text names the file and the line.

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
        raise DataError(f"path={path!r} is no path: pass a string or a pathlib.Path")
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise DataError(f"path={str(path)!r} has an unknown suffix: use {', '.join(_SUFFIXES)}")
    if not _is_file(path):
        raise DataError(f"path={str(path)!r} is not a file: check the name and the folder")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    records = [_checked(record, f"{path}, {place}: ") for place, record in rows]
    if not records:
        raise DataError(f"path={str(path)!r} holds no record: write one chat per line or row")
    return records


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # A name that is too long, or holds a zero byte.
        return False


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Lines are split as bytes: JSON text may hold line separators that only Python splits at.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
            except DataError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            except RecursionError as error:
                raise DataError(f"{path}, line {number}: nested too deeply for a chat") from error
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON ({error}): write one complete JSON object "
                    "per line, in UTF-8"
                ) from error
            yield f"line {number}", record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, without keys that stand there twice: only one of them would be read."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key {twice!r:.80} stands twice in one object: remove one")
    return found


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        records = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"path={str(path)!r} cannot be read as parquet ({error}): the file may be cut off, "
            "write or download it again"
        ) from error
    for number, record in enumerate(records, start=1):
        yield f"row {number}", _without_nulls(record)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _checked(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}{record!r:.80} is not an object with messages")
    if "messages" not in record:
        raise DataError(
            f"{where}no messages, only {', '.join(map(str, record)) or 'nothing'}: give each "
            "record a list of messages under the key 'messages'"
        )
    check_messages(record["messages"], where)
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}tools is a string, but not JSON ({error})") from error
        record = {**record, "tools": tools}
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}tools={tools!r:.80} is not a list of function descriptions")
    return record


@dataclass(frozen=True)
class Encoded:
    """Samples that each hold an answer, and how many chats were cut or left out on the way."""

    samples: list[Sample]
    dropped: int
    truncated: int

    def summary(self) -> str:
        """One sentence for a log."""
        tokens = sum(len(sample["input_ids"]) for sample in self.samples)
        answers = sum(int(sample["answer_mask"].sum()) for sample in self.samples)
        return (
            f"{len(self.samples)} samples with {tokens} tokens, {answers} of them answers; "
            f"{self.truncated} truncated, {self.dropped} dropped without an answer."
        )


def encode_chats(
    records: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    merge_context: bool = True,
    progress: bool = False,
) -> Encoded:
    """Encode every chat as `encode_chat` does, and drop those left without an answer to predict.

    An answer token in first place does not count: nothing comes before it to predict it from.

    Args:
        records: dicts with `messages` and optionally `tools`.
        tokenizer: a Hugging Face tokenizer with a chat template.
        max_length: cut to so many tokens, on the tokenizer's `truncation_side`.
        merge_context: whether consecutive non-assistant messages form one turn.
        progress: whether to show a progress bar.

    Raises:
        DataError: a record that cannot be encoded, with its index, or no answer in any of them.

    Example:
        >>> from metafocus.data import encode_chats
        >>> from metafocus.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["a tiny text"])
        >>> chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
        >>> encode_chats([{"messages": chat}, {"messages": chat[:1]}], tokenizer).summary()
        '1 samples with 25 tokens, 3 of them answers; 0 truncated, 1 dropped without an answer.'
    """
    check_max_length(max_length)
    if isinstance(records, str | Mapping) or not isinstance(records, Iterable):
        raise DataError(
            f"records is a {type(records).__name__}: pass a list of dicts with messages, as "
            "read_chats returns it"
        )
    if progress:
        from tqdm import tqdm

        records = tqdm(records, desc="encoding chats", unit="chat")

    samples: list[Sample] = []
    seen = truncated = cut_off = 0
    for seen, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            raise DataError(f"record {seen - 1}: {record!r:.80} is no dict with messages")
        try:
            whole = encode_chat(
                record.get("messages"),  # pyright: ignore[reportArgumentType]
                tokenizer,
                tools=record.get("tools"),
                merge_context=merge_context,
            )
        except DataError as error:
            raise DataError(f"record {seen - 1}: {error}") from error
        sample = truncate(whole, max_length, tokenizer.truncation_side)
        truncated += sample is not whole
        if sample["answer_mask"][1:].any():
            samples.append(sample)
        elif whole["answer_mask"][1:].any():
            cut_off += 1
    if not samples:
        raise DataError(
            f"no answers at all in {seen} chats: {cut_off} lost theirs to max_length={max_length} "
            f"on the {tokenizer.truncation_side} side, {seen - cut_off} have no trained assistant "
            "message: raise max_length or set tokenizer.truncation_side='left', and check the "
            "roles and weights of the messages"
        )
    return Encoded(samples, dropped=seen - len(samples), truncated=truncated)
