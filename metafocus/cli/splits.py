"""The chats to train on, and those that are held out."""

from __future__ import annotations

import math
from typing import Any

from transformers import IntervalStrategy

from metafocus.cli import chats
from metafocus.cli.settings import STDLIB_SAMPLES, DataArguments
from metafocus.data import read_chats
from metafocus.data.reading import read_dataset
from metafocus.errors import DataError
from metafocus.trainer.config import FocusArguments


def read(
    data: DataArguments, seed: int, how: dict[str, Any]
) -> tuple[chats.Chats | None, chats.Chats]:
    """Return chats to train on and held-out ones; None for those that wait for a tokenizer.

    Args:
        data: the settings.
        seed: draws the chats that are held out, if none are named.
        how: keywords of `read_chats`.

    Raises:
        DataError: if the data cannot be read, or has not the splits.
    """
    heldout = read_chats(data.validation_file, **how) if data.validation_file else None
    if data.dataset_name is not None:
        train, named = _data_set(data, data.dataset_name, how)
        heldout = heldout or named
    else:
        train = chats.read(data.train_file or "", **how)
    if train is None or heldout is not None:
        return train, heldout or []
    return chats.split(train, data.validation_split_percentage, seed)


def _data_set(
    data: DataArguments, name: str, how: dict[str, Any]
) -> tuple[chats.Chats, chats.Chats | None]:
    """Return the split to train on and the one that is held out, if there is one."""
    limit = data.max_train_samples if data.dataset_streaming else None
    if limit is not None:
        # Some of them may be held out.
        limit = math.ceil(limit / (1 - data.validation_split_percentage / 100))
    held: list[str] = []

    def choose(known: list[str]) -> list[str]:
        for flag in ("dataset_train_split", "dataset_test_split"):
            part = getattr(data, flag)
            if part is not None and part not in known:
                raise DataError(
                    f"dataset_name={name!r} has no split named {part}, only {', '.join(known)}: "
                    f"pass --{flag} with one of them."
                )
        if not data.validation_file:
            possible = (data.dataset_test_split, "validation", "test")
            held.extend([part for part in possible if part in known][:1])
        return [data.dataset_train_split, *held]

    parts = read_dataset(
        name,
        data.dataset_config_name,
        streaming=data.dataset_streaming,
        choose=choose,
        limit=limit,
        **how,
    )
    return parts[data.dataset_train_split], parts[held[0]] if held else None


def documentation(
    data: DataArguments, tokenizer: Any, seed: int, heldout: chats.Chats
) -> tuple[chats.Chats, chats.Chats]:
    """Return chats about the standard library; held-out ones are about other modules of it."""
    count = data.max_train_samples or STDLIB_SAMPLES
    made = {"max_length": data.max_length, "turns": data.stdlib_turns, "seed": seed}
    train = chats.documentation(tokenizer, split="train", n=count, **made)
    if not heldout and data.validation_split_percentage:
        held = data.max_eval_samples or max(count // 10, 8)
        heldout = chats.documentation(tokenizer, split="heldout", n=held, **made)
    return train, heldout


def check_evaluation(
    args: FocusArguments, data: DataArguments, train: chats.Chats | None, heldout: chats.Chats
) -> None:
    """Raise if there is nothing to evaluate on while training."""
    made = train is None and data.validation_split_percentage > 0
    if args.eval_strategy != "no" and not heldout and not made:
        raise DataError(
            f"--eval_strategy {IntervalStrategy(args.eval_strategy).value} has nothing to evaluate "
            "on: name --validation_file FILE, or pass --validation_split_percentage above 0."
        )
