"""The long-context suites of `metafocus eval`: their tasks, lengths and questions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from metafocus.cli import options
from metafocus.errors import DataError
from metafocus.evals import babilong, helmet, nolima, ruler
from metafocus.evals.items import Item
from metafocus.evals.prose import Prose, builtin_prose, prose_from_file
from metafocus.trainer.names import named

SUITES: dict[str, Any] = {
    "babilong": babilong,
    "ruler": ruler,
    "nolima": nolima,
    "helmet": helmet,
}
_NOISE = {"all": None, "train": "train", "heldout": "heldout"}


def tasks(args: argparse.Namespace) -> list[str]:
    """Return the tasks that `--tasks` names; by default those of the suite."""
    known = SUITES[args.suite].TASKS
    if args.suite != "ruler":
        options.note_unused(args, ("questions",), f"with --suite {args.suite}")
    if args.tasks is None:
        # BABILong's leaderboard has five of its twenty tasks.
        usual = babilong.LEADERBOARD if args.suite == "babilong" else known
        return [task for task in usual if task != "qa" or args.questions]
    chosen = list(dict.fromkeys(options.words(args.tasks)))
    for task in chosen:
        named("tasks", task, dict.fromkeys(known))
    if not chosen:
        raise DataError(f"--tasks is empty: use some of {', '.join(known)}.")
    if args.suite == "ruler" and "qa" in chosen and not args.questions:
        raise DataError("--tasks qa needs --questions FILE: .jsonl, SQuAD or HotpotQA.")
    return chosen


def lengths(text: str, suite: str) -> list[int]:
    """Return the numbers of tokens that `--lengths` names, in order."""
    found = []
    for word in (word.strip().lower() for word in text.split(",")):
        digits = word.removesuffix("k")
        if not digits.isdecimal():
            raise DataError(f"--lengths {text!r}: {word!r} is not a length such as 4k or 500.")
        found.append(int(digits) * (1024 if word.endswith("k") else 1))
    if suite != "babilong" and 0 in found:
        name = {"ruler": "RULER", "nolima": "NoLiMa", "helmet": "HELMET"}[suite]
        raise DataError(f"--lengths {text!r}: 0k is for BABILong only, {name} needs a haystack.")
    return sorted(set(found))


def generator(args: argparse.Namespace, longest: int) -> Callable[[Any, str, int, int], list[Item]]:
    """Return a function from a counter of tokens, a task, a length and n to n questions."""
    make = SUITES[args.suite].generate
    common: dict[str, Any] = {"seed": args.seed}
    if args.suite == "helmet":
        options.note_unused(args, ("noise",), "with --suite helmet")
    else:
        common["prose"] = _prose(args.noise, longest)
    if args.suite == "ruler" and args.questions:
        common["questions"] = ruler.read_questions(args.questions)
    return lambda count, task, length, n: make(count, task=task, length=length, n=n, **common)


def _prose(noise: str, longest: int) -> Prose:
    prose = builtin_prose(_NOISE[noise]) if noise in _NOISE else prose_from_file(noise)
    size = sum(len(sentence.split()) for sentence in prose.sentences)
    if size < longest:
        # Each word has at least one token, so prose with fewer words than tokens must repeat.
        print(f"note: --noise has {size} words and repeats in longer contexts.", file=sys.stderr)
    return prose
