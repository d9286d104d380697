"""The chats of a command: those of a file, or questions made of what lies on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from metafocus.data import read_chats, stdlib_qa
from metafocus.errors import DataError

Chats = list[dict[str, Any]]


def read(data: str) -> Chats | None:
    """Return the chats of `--data FILE`; None for `--data stdlib`, whose wait for a tokenizer."""
    return None if data == "stdlib" else read_chats(data)


def texts(chats: Chats | None) -> Iterable[str]:
    """Yield what to train a tokenizer on: the contents of the chats, or the documentation."""
    if chats is None:
        yield from stdlib_qa.texts()
        return
    for chat in chats:
        for message in chat["messages"]:
            if isinstance(message.get("content"), str):
                yield message["content"]


def standard_library(args: argparse.Namespace, tokenizer: Any) -> tuple[Chats, Chats]:
    """Return the chats to train on and those held out that `--data stdlib` stands for."""
    sizes = {"train": args.samples, "heldout": max(args.samples // 10, 8)}
    chats, heldout = (
        documentation(args, tokenizer, split=split, n=n, turns=args.turns)
        for split, n in sizes.items()
    )
    return chats, heldout


def documentation(
    args: argparse.Namespace, tokenizer: Any, *, split: str, n: int, turns: int = 1
) -> Chats:
    """Return chats of one split of the documentation, of at most `--max-length` tokens."""
    # Room for the questions, the answers and the template around them.
    context = max(args.max_length - 96 * turns, 64)
    try:
        return stdlib_qa.generate(
            tokenizer, split=split, n=n, context_tokens=context, turns=turns, seed=args.seed
        )
    except DataError as error:
        raise DataError(f"--data stdlib with --max-length {args.max_length}: {error}.") from error
