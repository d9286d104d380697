"""Questions from a file, with their documents among those of other questions."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from metafocus.errors import DataError
from metafocus.evals.draft import Draft, Plan
from metafocus.files import existing

# Said before and after the documents, as published.
_ASK = "Answer the question from the documents, in a few words and without any other text."


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers and its documents.

    All `documents` are in every prompt. `supporting` has the numbers of those that hold the answer,
    or is empty if all of them do: HotpotQA gives each question eight distractors. `related`
    documents fill a prompt before those of other questions: SQuAD has paragraphs of one article.
    """

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    supporting: tuple[int, ...] = ()
    related: tuple[str, ...] = ()


def read_questions(path: str | Path) -> tuple[Question, ...]:
    """Read questions from JSON lines, or from a file in the form of SQuAD or of HotpotQA.

    A line is `{"question": ..., "answers": [...], "documents": [...]}`, and may have `supporting`
    (numbers) and `related` (documents). Questions of SQuAD that have no answer are left out. The
    other paragraphs of its article are `related`. In HotpotQA all ten documents of a context belong
    to the question.

    Raises:
        DataError: if the file does not exist or is not JSON, or if a record has no question,
            answers or documents.
    """
    path = existing(path, "name a file of questions")
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
    related, supporting = record.get("related", []), record.get("supporting", [])
    for name, row in (("answers", answers), ("documents", documents), ("related", related)):
        empty = not row and name != "related"
        if (
            not isinstance(row, list)
            or empty
            or not all(isinstance(x, str) and x.strip() for x in row)
        ):
            raise ValueError(f"{name}={row!r:.80} is not a list of strings")
    if not all(isinstance(i, int) and 0 <= i < len(documents) for i in supporting):
        raise ValueError(f"supporting={supporting!r:.80} are not numbers of documents")
    return Question(
        str(record["question"]), tuple(answers), tuple(documents), tuple(supporting), tuple(related)
    )


def _squad(data: dict[str, Any]) -> Iterator[Question]:
    for article in data["data"]:
        every = tuple(dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"]))
        for paragraph in article["paragraphs"]:
            own = paragraph["context"]
            related = tuple(context for context in every if context != own)
            for qa in paragraph["qas"]:
                texts = [answer["text"] for answer in qa["answers"]]
                answers = tuple(dict.fromkeys(text for text in texts if text.strip()))
                if answers and not qa.get("is_impossible"):
                    yield Question(qa["question"], answers, (own,), related=related)


def _hotpot(record: dict[str, Any]) -> Question:
    support = {title for title, _ in record["supporting_facts"]}
    titles = [title for title, _ in record["context"]]
    return _plain(
        {
            **record,
            "answers": [record["answer"]],
            "documents": [f"{t}\n{''.join(lines)}" for t, lines in record["context"]],
            "supporting": [i for i, title in enumerate(titles) if title in support],
        }
    )


def plan(rng: random.Random, questions: Sequence[Question], chosen: int) -> Plan:
    """Ask question `chosen`; the number of other documents is still to be chosen."""
    asked = questions[chosen]
    related = [document for document in asked.related if document not in asked.documents]
    pool = sorted(_documents(questions) - set(asked.documents) - set(related))
    rng.shuffle(related)
    rng.shuffle(pool)
    others, seed = [*related, *pool], rng.random()
    question = f"Question: {asked.question}"
    prefix = "Answer:"
    holding = asked.supporting or range(len(asked.documents))

    def build(n: int) -> Draft:
        numbered = [*asked.documents, *others[:n]]
        order = list(range(len(numbered)))
        random.Random(f"{seed} {n}").shuffle(order)
        pieces, spans, at = [], {}, len(_ASK) + 2
        for place, i in enumerate(order, start=1):
            piece = f"Document {place}:\n{numbered[i]}"
            spans[i] = (at, at + len(piece))
            pieces.append(piece)
            at += len(piece) + 2
        text = "\n\n".join(pieces)
        return Draft(
            prompt=f"{_ASK}\n\n{text}\n\n{_ASK}\n\n{question}",
            question=asked.question,
            prefix=prefix,
            answer=f"{prefix} {asked.answers[0]}",
            references=asked.answers,
            evidence=tuple(spans[i] for i in holding),
            depths=tuple((spans[i][0] - len(_ASK) - 2) / len(text) for i in holding),
        )

    return Plan(build, most=len(others))


@lru_cache(maxsize=4)
def _documents(questions: Sequence[Question]) -> frozenset[str]:
    return frozenset(d for question in questions for d in (*question.documents, *question.related))
