"""Sequences that live in a file: data beyond memory, read piece by piece."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from metafocus.data.chat import Sample

Item = TypeVar("Item")


class Spool(Sequence[Item], Generic[Item]):
    """A sequence in a file without a name, which goes away with the process that made it.

    Memory holds eight bytes for each item. Items are read with `pread`, and neither mapped nor
    cached by this process, so that reading all of them does not count as its memory either.
    Processes that are forked may read it at the same time.

    Args:
        dump: makes bytes of an item.
        load: makes the item of the bytes.
        folder: of the file; None: that of temporary files, which may lie in memory.
    """

    def __init__(
        self,
        dump: Callable[[Item], bytes],
        load: Callable[[bytes], Item],
        folder: str | Path | None = None,
    ):
        self._dump, self._load = dump, load
        # The file has no buffer, because a forked process would write the buffer a second time.
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        self._ends = array("Q", [0])
        self._hash = hashlib.blake2b(digest_size=16)

    def append(self, item: Item) -> None:
        """Write an item to the end.

        Raises:
            OSError: for a full disk.
        """
        content = self._dump(item)
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._hash.update(content)
        self._ends.append(self._ends[-1] + len(content))

    def extend(self, items: Iterable[Item]) -> Spool[Item]:
        """Write items to the end; return the spool."""
        for item in items:
            self.append(item)
        return self

    def digest(self) -> str:
        """Return a hash of all items in their order."""
        return self._hash.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        # Workers of a data loader that are not forked open the file of their parent.
        path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        return {**self.__dict__, "_file": path, "_hash": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path = state.pop("_file")
        self.__dict__.update(state)
        self._file = open(path, "rb", buffering=0)

    def __del__(self) -> None:
        if "_file" in self.__dict__:
            self._file.close()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """Return an item, or a view of a slice."""
        if isinstance(index, slice):
            return View(self, range(len(self))[index])
        place = range(len(self))[index]
        start, end = self._ends[place], self._ends[place + 1]
        content = os.pread(self._file.fileno(), end - start, start)
        return self._load(content)

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))


class View(Sequence[Item], Generic[Item]):
    """Some items of a sequence, in an order of their own; nothing is copied.

    Example:
        >>> list(View("abcd", [3, 0])), View("abcd", range(1, 4))[1]
        (['d', 'a'], 'c')
    """

    def __init__(self, source: Sequence[Item], places: Sequence[int]):
        self._source, self._places = source, places

    def digest(self) -> str:
        """Return a hash of the items, from that of a source which has one."""
        source: Any = self._source
        text = f"{source.digest()} {list(self._places)}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        """Return an item, or a view of a slice."""
        if isinstance(index, slice):
            return View(self._source, self._places[index])
        return self._source[self._places[index]]

    def __eq__(self, other: object) -> bool:
        """Whether another sequence has the same items, as for lists."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__: ClassVar[None] = None  # pyright: ignore[reportIncompatibleMethodOverride]


def records(folder: str | Path | None = None) -> Spool[dict[str, Any]]:
    """Return an empty spool of what JSON can hold: chats.

    Example:
        >>> chats = records().extend({"messages": [i]} for i in range(3))
        >>> chats[-1], len(chats[1:])
        ({'messages': [2]}, 2)
    """
    return Spool(_line, json.loads, folder)


def samples(folder: str | Path | None = None) -> Spool[Sample]:
    """Return an empty spool of samples, dicts of 1-D tensors of integers and booleans.

    Example:
        >>> spool = samples()
        >>> spool.append({"input_ids": torch.tensor([5, 6]), "answer_mask": torch.ones(2) > 0})
        >>> spool[0]
        {'input_ids': tensor([5, 6]), 'answer_mask': tensor([True, True])}
    """
    return Spool(_packed, _unpacked, folder)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, default=str).encode()


def _packed(sample: Sample) -> bytes:
    """Four bytes for an integer, one for a boolean, after a line that names the entries."""
    header = [[name, value.dtype == torch.bool, len(value)] for name, value in sample.items()]
    parts = [
        value.to(torch.uint8 if value.dtype == torch.bool else torch.int32).numpy().tobytes()
        for value in sample.values()
    ]
    return b"".join([json.dumps(header).encode(), b"\n", *parts])


def _unpacked(content: bytes) -> Sample:
    first = content.index(b"\n") + 1
    sample: Sample = {}
    for name, boolean, length in json.loads(content[:first]):
        dtype, size = (torch.uint8, 1) if boolean else (torch.int32, 4)
        raw = bytearray(content[first : first + size * length])
        value = torch.frombuffer(raw, dtype=dtype) if length else torch.zeros(0, dtype=dtype)
        sample[name] = value.bool() if boolean else value.long()
        first += size * length
    return sample
