"""Questions from a file, with their documents among those of other questions."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metafocus.errors import DataError
from metafocus.evals.ruler.draft import Draft, Plan, hide


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers and the documents that hold them."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


def read_questions(path: str | Path) -> tuple[Question, ...]:
    """Read questions from JSON lines, or from a file in the form of SQuAD or of HotpotQA.

    A line is `{"question": ..., "answers": [...], "documents": [...]}`. Questions of SQuAD that
    have no answer are left out. In HotpotQA, the supporting documents of a context belong to the
    question.

    Raises:
        DataError: if the file does not exist or is not JSON, or if a record has no question,
            answers or documents.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"path={str(path)!r} is not a file: name a file of questions")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            found = [_plain(json.loads(line)) for line in text.split("\n") if line.strip()]
        else:
            data = json.loads(text)
            found = list(_squad(data) if isinstance(data, dict) else map(_hotpot, data))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"path={str(path)!r}: {type(error).__name__} {error}; give .jsonl lines with question, "
            "answers and documents, or a .json file as SQuAD or HotpotQA have it"
        ) from error
    if not found:
        raise DataError(f"path={str(path)!r} holds no question")
    return tuple(found)


def _plain(record: dict[str, Any]) -> Question:
    answers, documents = record["answers"], record["documents"]
    for name, row in (("answers", answers), ("documents", documents)):
        if not isinstance(row, list) or not row or not all(isinstance(x, str) and x for x in row):
            raise ValueError(f"{name}={row!r:.80} is not a list of strings")
    return Question(str(record["question"]), tuple(answers), tuple(documents))


def _squad(data: dict[str, Any]) -> Iterator[Question]:
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                if answers and not qa.get("is_impossible"):
                    yield Question(qa["question"], answers, (paragraph["context"],))


def _hotpot(record: dict[str, Any]) -> Question:
    support = {title for title, _ in record["supporting_facts"]}
    documents = [f"{t}\n{''.join(lines)}" for t, lines in record["context"] if t in support]
    return _plain({**record, "answers": [record["answer"]], "documents": documents})


def plan(rng: random.Random, questions: Sequence[Question], chosen: int) -> Plan:
    """Ask question `chosen`; the number of other documents is still to be chosen."""
    asked = questions[chosen]
    others = {document for question in questions for document in question.documents}
    pool = sorted(others - set(asked.documents))
    rng.shuffle(pool)
    draws = [rng.random() for _ in asked.documents]
    heading = "Answer the question at the end from the documents below, in a few words.\n\n"
    question = f"Question: {asked.question}"
    prefix = "Answer:"

    def build(n: int) -> Draft:
        # Without numbers, which would show how many documents there are and where one is.
        slots = [int((n + 1) * draw) for draw in draws]
        units = [f"Document: {document}" for document in pool[:n]]
        needles = [f"Document: {document}" for document in asked.documents]
        text, spans, depths = hide(heading, units, needles, slots, "\n\n")
        return Draft(
            prompt=f"{text}\n\n{question}",
            question=asked.question,
            prefix=prefix,
            answer=f"{prefix} {asked.answers[0]}",
            references=asked.answers,
            evidence=spans,
            depths=depths,
        )

    return Plan(build, most=len(pool))
