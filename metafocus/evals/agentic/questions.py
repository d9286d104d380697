"""Multiple-choice questions: their prompt, and the files of GPQA and LongBench v2."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metafocus.errors import DataError
from metafocus.evals.agentic.letters import LETTERS
from metafocus.files import existing

COLUMNS = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
"""The columns of GPQA's files that are read."""
_LONGBENCH = ("question", *(f"choice_{letter}" for letter in "ABCD"), "context")


@dataclass(frozen=True)
class Choice:
    """A question with its choices; `answer` is the number of the right one.

    `context` is a text that the question is about, and `topic` groups questions.

    Raises:
        DataError: if there are fewer than 2 or more than 10 choices, if two are equal, or if
            `answer` is not the number of a choice.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    topic: str = ""
    context: str = ""

    def __post_init__(self) -> None:
        n = len(self.choices)
        if not 2 <= n <= len(LETTERS) or len(set(self.choices)) != n or not 0 <= self.answer < n:
            raise DataError(
                f"choices={self.choices!r}, answer={self.answer}: give 2 to {len(LETTERS)} "
                "different choices and the number of the right one"
            )

    @property
    def letter(self) -> str:
        """The letter of the right choice."""
        return LETTERS[self.answer]

    @property
    def prompt(self) -> str:
        """The context, if there is one, the question and its lettered choices."""
        rows = [f"({LETTERS[i]}) {choice}" for i, choice in enumerate(self.choices)]
        text = ["<text>", self.context.strip(), "</text>", ""] if self.context else []
        return "\n".join([*text, self.question, "", *rows])


def shuffled(
    question: str, right: str, wrong: Sequence[str], rng: random.Random, topic: str = ""
) -> Choice:
    """Return a question whose right choice is at each place with the same probability."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return Choice(question, tuple(choices), choices.index(right), topic)


def read_gpqa(path: str | Path, seed: int = 0) -> list[Choice]:
    """Read questions from a CSV file with GPQA's columns; the choices are shuffled by the seed.

    The columns are `Question`, `Correct Answer` and `Incorrect Answer 1` to `3`. If there is a
    column `High-level domain`, it gives the topic. Other columns are ignored. GPQA's files (such
    as gpqa_diamond.csv) are available to those who accept their terms, and must not be published.
    The order of the choices of a question depends only on the seed and its row.

    Raises:
        DataError: if the file does not exist or is not UTF-8, if a column or a cell is missing, or
            if two choices are equal.
    """
    path = existing(path, "name a CSV file of GPQA")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"path={str(path)!r} cannot be read as CSV in UTF-8: {error}") from error
    if not rows:
        raise DataError(f"path={str(path)!r} holds no questions: it needs a header and rows")
    found = []
    for i, row in enumerate(rows):
        cells = [(row.get(name) or "").strip() for name in COLUMNS]
        for name, cell in zip(COLUMNS, cells, strict=True):
            if not cell:
                raise DataError(f"path={str(path)!r}, question {i + 1}: {name!r} is missing")
        try:
            rng = random.Random(f"gpqa {seed} {i}")
            topic = (row.get("High-level domain") or "").strip()
            found.append(shuffled(cells[0], cells[1], cells[2:], rng, topic))
        except DataError as error:
            raise DataError(f"path={str(path)!r}, question {i + 1}: {error}") from error
    return found


def read_longbench(path: str | Path) -> list[Choice]:
    """Read questions from LongBench v2's file, JSON or JSON lines.

    A record has `question`, `choice_A` to `choice_D`, `answer` (a letter) and `context`. The topic
    is made of `domain`, `difficulty` and `length`, if they are there. The order of the choices is
    kept.

    Raises:
        DataError: if the file does not exist or is not JSON, or if a record lacks a field.
    """
    path = existing(path, "name data.json of LongBench v2")
    found: list[Choice] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        for record in records:
            question, *choices, context = (_text(record, name) for name in _LONGBENCH)
            groups = (record.get(name) for name in ("domain", "difficulty", "length"))
            found.append(
                Choice(
                    question,
                    tuple(choices),
                    ("A", "B", "C", "D").index(record["answer"]),
                    " / ".join(str(group) for group in groups if group),
                    context,
                )
            )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"path={str(path)!r}, record {len(found) + 1}: {type(error).__name__} {error}; give "
            "question, choice_A to choice_D, answer and context"
        ) from error
    if not found:
        raise DataError(f"path={str(path)!r} holds no questions")
    return found


def _text(record: dict[str, Any], name: str) -> str:
    if not isinstance(record[name], str) or not record[name].strip():
        raise ValueError(f"{name!r} is empty or no text")
    return record[name]
