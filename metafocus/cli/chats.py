"""The chats of a command: from a file, a data set, or the documentation on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from metafocus.data import read_chats, spool, stdlib_qa
from metafocus.data.reading import Gather
from metafocus.data.spool import View
from metafocus.errors import DataError
from metafocus.files import text_of

Chats = Sequence[dict[str, Any]]

STDLIB = "stdlib"
"""Names, instead of a file, questions about the documentation of the Python standard library."""


def gatherer(folder: Path) -> Gather:
    """Return what keeps records in a file of a folder, so that they need no memory."""
    return lambda rows: spool.records(folder).extend(rows)


def read(
    train_file: str, *, gather: Gather = list, skipped: list[str] | None = None
) -> Chats | None:
    """Return the chats of a file; None for `stdlib`, whose chats wait for a tokenizer.

    Args:
        train_file: the name of the file, or `stdlib`.
        gather: makes a sequence of the records.
        skipped: a list that takes the reasons for which records are left out; None: a record that
            is malformed raises.
    """
    return None if train_file == STDLIB else read_chats(train_file, gather=gather, skipped=skipped)


def texts(chats: Chats | None) -> Iterable[str]:
    """Yield what to train a tokenizer on: the contents of the chats, or the documentation."""
    if chats is None:
        yield from stdlib_qa.texts()
        return
    for chat in chats:
        if isinstance(chat.get("text"), str):
            yield chat["text"]
        for message in chat.get("messages", ()):
            if isinstance(message.get("content"), str):
                yield message["content"]


def template(path: str | None) -> str | None:
    """Return the chat template in a file.

    Raises:
        DataError: if it cannot be read.
    """
    return None if path is None else text_of(Path(path), f"--chat_template {path}")


def documentation(
    tokenizer: Any, *, split: str, n: int, max_length: int, seed: int, turns: int = 1
) -> Chats:
    """Return chats of one split of the documentation, of at most `max_length` tokens.

    Raises:
        DataError: if `max_length` is too short for a question and its evidence.
    """
    # Room for the questions, the answers and the template around them.
    context = max(max_length - 96 * turns, 64)
    try:
        return stdlib_qa.generate(
            tokenizer, split=split, n=n, context_tokens=context, turns=turns, seed=seed
        )
    except DataError as error:
        raise DataError(f"{STDLIB} with --max_length {max_length}: {error}.") from error


def split(chats: Chats, percentage: float, seed: int) -> tuple[Chats, Chats]:
    """Return the chats to train on, and those held out, drawn by a seed.

    Raises:
        DataError: if there are too few.
    """
    if percentage == 0:
        return chats, []
    if len(chats) < 2:
        raise DataError(
            f"{len(chats)} chat is not enough to hold one out: name --validation_file FILE, or "
            "pass --validation_split_percentage 0."
        )
    order = torch.randperm(len(chats), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(round(percentage / 100 * len(chats)), 1), len(chats) - 1)
    return View(chats, order[count:]), View(chats, order[:count])
